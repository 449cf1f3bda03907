"""Probes on hidden states, and the subspaces that they give."""
