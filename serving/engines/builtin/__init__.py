"""The built-in engine: speculative decoding on PyTorch, on a CPU or one GPU."""
