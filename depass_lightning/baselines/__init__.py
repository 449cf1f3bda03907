"""What DePass is compared with: other methods, with the same face and the same batches."""
