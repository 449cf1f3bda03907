"""Variants of the engine; not needed to understand the method."""
