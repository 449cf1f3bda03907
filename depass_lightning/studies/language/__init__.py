"""Language and meaning in a model's states."""
