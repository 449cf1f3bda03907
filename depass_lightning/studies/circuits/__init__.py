"""Faithfulness of circuits of heads and MLPs on prompts with a corrupted counterpart."""
