"""The two operations that carry quantization in plain networks, as torch computes them or as ONNX spells them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ptq_exp.runtime.integers import BYTE

OPSET = 21
"""Version of the ONNX operators that are written: the first with `DequantizeLinear` of int8 as it is used here."""
_spelt_for_onnx = False


@contextmanager
def spelt_for_onnx() -> Iterator[None]:
    """Inside, the operations are `QuantizeLinear` and `DequantizeLinear`, for `torch.export` alone: no values."""
    global _spelt_for_onnx
    before, _spelt_for_onnx = _spelt_for_onnx, True
    try:
        yield
    finally:
        _spelt_for_onnx = before


def on_byte_grid(x: Tensor, scale: float, zero: int, first: int) -> Tensor:
    """Round `x` to scale * (level - zero) with the nearest level among the 256 from `first` on, -128 or 0."""
    if not _spelt_for_onnx:
        if torch.jit.is_tracing():  # the operation that engines recognise
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, first, first + BYTE - 1)
        lowest = first - zero  # several times faster than that operation, which also makes a mask for gradients
        return x.div(scale).round_().clamp_(lowest, lowest + BYTE - 1).mul_(scale)
    kind = torch.int8 if first < 0 else torch.uint8
    how = torch.tensor(scale), torch.tensor(zero, dtype=kind)
    levels = _node("QuantizeLinear", (x, *how), kind, x.shape)
    return _node("DequantizeLinear", (levels, *how), torch.float32, x.shape)


def dequantized(levels: Tensor, scale: Tensor) -> Tensor:
    """Compute the weight float32 of int8 `levels` [out_channels, ...] and `scale` [out_channels, 1, ...]."""
    if not _spelt_for_onnx:
        return levels.float() * scale
    return _node("DequantizeLinear", (levels, scale.flatten()), torch.float32, levels.shape, axis=0)


def _node(name: str, inputs: tuple[Tensor, ...], kind: torch.dtype, shape: torch.Size, **attributes: int) -> Tensor:
    from torch.onnx import ops  # since torch 2.8

    return ops.symbolic(name, inputs, attributes, dtype=kind, shape=shape, version=OPSET)
