"""The commands; the only package that uses Hydra."""
