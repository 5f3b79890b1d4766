"""The weights of a quantized model as a GGUF file, in blocks of 32 as programs of the ggml family read them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptq_exp import __version__
from ptq_exp.deploy.integer_weights import plain_weight
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import DataError, not_installed
from ptq_exp.quantization import WeightQuantizer
from ptq_exp.quantization.online import OnlineLayer
from ptq_exp.storage.atomic import atomic_path

ARCHITECTURE = "ptq-exp"
"""Of the file's metadata: names of tensors are those of the network, which readers map to their own."""
BLOCK = 32
TYPES = {4: ("Q4_0", "Q4_1"), 5: ("Q5_0", "Q5_1"), 8: ("Q8_0", "Q8_0")}
"""Most bits of a weight -> block types: of weights with zero point 0, and with another."""


def check_gguf() -> None:
    """Raise ConfigError where the package that writes these files is not installed."""
    if find_spec("gguf") is None:
        raise not_installed("format=gguf", "the package gguf", "gguf")


def write_gguf(quantized: QuantizedModel, path: Path) -> dict[str, Any]:
    """Write all parameters of the quantized network: weights in blocks of their bits, the others as float32.

    The quantized values are encoded anew: a block of 32 neighbours along the last axis has its own scale (and least
    value, where zero points are not 0), in 16 bits. A weight whose last axis is no multiple of 32, such as that of a
    3x3 convolution, is written as float16. Rotations, smoothing of inputs and low-rank branches have no place there and
    are put into the weights. Activations are not quantized by what reads such files.

    Returns:
        `types`, {block type: number of tensors}, and `distance`, {weight: relative distance from the quantized one}.

    Raises:
        ConfigError: the package gguf is not installed.
        DataError: the network has no quantized weight.
        PTQError: the file cannot be written.
    """
    check_gguf()
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    chosen = {name: _type(module) for name, module in quantized.network.named_modules()}
    types: dict[str, int] = {}
    distance: dict[str, float] = {}
    if not any(chosen.values()):
        raise DataError("format=gguf: the network has no quantized weight")
    with atomic_path(path) as temporary:
        writer = GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string("general.name", quantized.model.name)
        writer.add_string(f"{ARCHITECTURE}.version", __version__)
        writer.add_string(f"{ARCHITECTURE}.model_digest", quantized.model.digest)
        for name, parameter in quantized.network.named_parameters():
            module, _, own = name.rpartition(".")
            wanted = chosen.get(module) if own == "weight" else None
            values = _values(quantized.network.get_submodule(module), own, parameter)
            kind = _kind(wanted, values)
            types[kind] = types.get(kind, 0) + 1
            if wanted is None:
                writer.add_tensor(name, values)
                continue
            block = GGMLQuantizationType[kind]
            encoded = quantize(values, block)
            distance[name] = _distance(np.asarray(dequantize(encoded, block), np.float32).reshape(values.shape), values)
            if kind == "F16":
                writer.add_tensor(name, values.astype(np.float16))
            else:
                writer.add_tensor(name, encoded, raw_dtype=block)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"types": types, "distance": distance}


def _type(module: nn.Module) -> str | None:
    """Return the block type of a layer's weight; None where it is not quantized."""
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, WeightQuantizer):
        return None
    bits = quantizer.bits if isinstance(quantizer.bits, int) else max(TYPES)
    symmetric, asymmetric = TYPES[min(most for most in TYPES if most >= bits)]
    return symmetric if quantizer.symmetric else asymmetric


def _values(module: nn.Module, own: str, parameter: torch.Tensor) -> np.ndarray:
    """Return a parameter of `module`, its weight without transforms that work at run time."""
    values = plain_weight(module) if own == "weight" and isinstance(module, OnlineLayer) else parameter.detach()
    return values.to("cpu", torch.float32).numpy()


def _kind(wanted: str | None, values: np.ndarray) -> str:
    if wanted is None:
        return "F32"
    return wanted if values.shape[-1] % BLOCK == 0 else "F16"


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
