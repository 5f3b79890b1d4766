"""Post-training quantization of diffusion models: experiments that can be composed, repeated and compared."""

__version__ = "0.1.0"
