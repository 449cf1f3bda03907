"""The decomposition engine: record one plain pass, freeze what is not linear, carry components through it."""
