"""A quantized model as one object: its files, what it may be combined with, its card."""
