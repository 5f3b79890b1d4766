"""Post-training quantization of diffusion models: experiments that can be composed, repeated and compared."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_LAZY = {
    "load_model": "ptq_exp.diffusion.zoo.registry", "MODELS": "ptq_exp.diffusion.zoo.registry", "sample": "ptq_exp.api",
    "load_quantized": "ptq_exp.deploy.load", "quantize": "ptq_exp.api", "forecast": "ptq_exp.api",
}
_PACKAGES = ("calibration", "correction", "diffusion", "embedded", "evaluation", "pipelines", "quantization")


def __getattr__(name: str) -> Any:
    """Import a name of the Python interface at its first use: help and errors of the command do without torch."""
    if name not in (*_LAZY, *_PACKAGES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f"ptq_exp.{name}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_PACKAGES])


import_module("ptq_exp.deploy.registration").register()  # quantized pipelines are loaded by diffusers itself
