"""Files, processes, batches, words and confidence intervals: helpers of every package."""
