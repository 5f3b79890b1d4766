"""What is seen while a network runs: values at quantizers, where tensors come from, what is concatenated."""
