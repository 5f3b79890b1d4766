"""Integers as engines multiply them: grids of activations, levels of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.quantization.quantizer import Quantizer

BYTE = 256
"""Levels of an 8-bit integer: activations and shifted weights with more are executed in float."""
SEVEN_BITS = 64
"""Largest weight level whose products with two 8-bit activations fit into 16 bits (CPUs without VNNI add pairs)."""


@dataclass(frozen=True)
class Grid:
    """Integer grid of an activation: the values scale * level, levels from `lowest` to `highest`.

    Levels count from the zero point. All fields are float32 [rows]; one row is in force at each sampling step.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor

    @property
    def rows(self) -> int:
        return len(self.scale)

    @property
    def levels(self) -> int:
        """The largest number of levels of a row."""
        return int((self.highest - self.lowest).max()) + 1

    @property
    def symmetric(self) -> bool:
        """Whether the levels fit a signed byte: the zero point is the integer 0."""
        return bool((self.lowest >= -BYTE // 2).all() and (self.highest < BYTE // 2).all())

    @property
    def one_sided(self) -> bool:
        """Whether 0 is the lowest level of every row."""
        return bool((self.lowest == 0).all())


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as scale * (levels + offset), with int8 `levels` of its own shape.

    Attributes:
        scale: float32 [out_channels].
        offset: int32 [out_channels], not zero where the levels from the zero point need nine bits.
    """

    levels: Tensor
    scale: Tensor
    offset: Tensor

    @property
    def shifted(self) -> bool:
        """Whether an offset has to be added: by one more output channel, of ones."""
        return bool(self.offset.any())


def grids(quantizer: nn.Module) -> tuple[Grid, ...]:
    """Return the grid of each segment of an activation quantizer; none for the identity."""
    if not isinstance(quantizer, Quantizer):
        return ()
    lowest, highest = quantizer.qmin - quantizer.zero_point, quantizer.qmax - quantizer.zero_point
    columns = zip(quantizer.scale.T, lowest.T, highest.T, strict=True)
    return tuple(Grid(*(part.detach().clone() for part in column)) for column in columns)


def shifted(levels: Tensor, scale: Tensor) -> IntegerWeight:
    """Shift levels that need nine bits into a signed byte, channel by channel; leave others as they are."""
    flat = levels.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    beyond = (low < -BYTE // 2) | (high >= BYTE // 2)
    offset = torch.where(beyond, low + BYTE // 2, torch.zeros_like(low)).int()
    shape = (-1,) + (1,) * (levels.ndim - 1)
    return IntegerWeight((levels - offset.view(shape)).to(torch.int8), scale, offset)


def regridded(weight: Tensor, largest: int = BYTE // 2 - 1) -> IntegerWeight:
    """Return symmetric levels up to `largest` per output channel, nearest to `weight`."""
    scale = (weight.flatten(1).abs().amax(1) / largest).clamp(min=1e-12)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    levels = (weight / scale.view(shape)).round().clamp(-largest, largest)
    return IntegerWeight(levels.to(torch.int8), scale, torch.zeros(len(scale), dtype=torch.int32))
