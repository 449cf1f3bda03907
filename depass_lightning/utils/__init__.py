"""Files, processes, words and intervals: what every package may use."""
