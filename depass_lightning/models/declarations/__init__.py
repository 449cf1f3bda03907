"""The declarations of decoder families, grouped by how their blocks are built."""
