"""A linear rule fitted to the model at hand."""
