"""Model families, the decoder that binds one to a model at hand, and the embedded model."""
