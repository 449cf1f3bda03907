"""The experiments of the paper, on any model and any task."""
