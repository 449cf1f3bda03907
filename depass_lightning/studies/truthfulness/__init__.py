"""Truthfulness: misleading prompts and what makes a model follow them."""
