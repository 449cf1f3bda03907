"""The declarations of decoder families, by what their blocks are built of."""
