"""The engine: record one plain pass, freeze what is not linear, propagate components through it."""
