"""Decoder families, the decoder that binds one to a model, and the bundled model."""
