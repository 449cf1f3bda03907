"""What a person looks at: the page, the notebook's panel, the figures and the terminal's tables."""
