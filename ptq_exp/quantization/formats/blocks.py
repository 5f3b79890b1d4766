"""`BlockFormat`: what formats have in common whose values share a scale, block by block of the last axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError


class Encoded(NamedTuple):
    """A tensor in a block format.

    Attributes:
        codes: uint8, of the tensor's shape.
        scales: by name, what else `decode` needs, in the types that are stored.
    """

    codes: Tensor
    scales: dict[str, Tensor]


@dataclass(frozen=True)
class BlockFormat(ABC):
    """A number format whose scales are found from the data; subclasses say how.

    Blocks lie along the last axis and begin with each row. Where rows are no multiple of `block`, their last block is
    shorter. The elements are chosen with the scale that is stored. A block with NaN becomes NaN.

    Attributes:
        name: key in `FORMATS`.
        block: values that share a scale; None = a whole row.
    """

    name: str
    block: int | None

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def tensor_scale(self) -> bool:
        """Whether the tensor has a scale beside those of its blocks."""
        return False

    @property
    def weights_only(self) -> bool:
        """Whether scales take too long to find for activations."""
        return False

    @property
    def elements(self) -> Tensor:
        """The values that an element can take, in units of its scale: ascending, float64.

        Raises:
            QuantizationError: they differ from row to row.
        """
        values = self._values()
        return torch.unique(values[values.isfinite()])

    def units(self, scales: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return what an element of 1 stands for, for each value of a tensor of this shape [..., L], float64.

        Raises:
            QuantizationError: as `elements`.
        """
        values = self._values()
        top = int(torch.where(values.isfinite(), values, -torch.inf).argmax())
        codes = torch.full(shape, top, dtype=torch.uint8, device=next(iter(scales.values())).device)
        return self.decode(Encoded(codes, dict(scales))).double() / float(values[top])

    def _values(self) -> Tensor:
        values = getattr(self, "values", None)
        if values is None:
            raise QuantizationError(f"{self.name}: its elements differ from row to row, GPTQ cannot choose among them")
        return values

    @property
    def bits_per_value(self) -> float:
        """Bits of a code and its share of the scales, in rows of whole blocks (without the scale of the tensor)."""
        length = self.block or 1 << 20
        return self.bits + self.scale_bits(length) / length

    @abstractmethod
    def scale_bits(self, length: int) -> int:
        """Return the bits of the scales of a row of `length` values."""

    @abstractmethod
    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Find the scales of `x` [..., L], in the types that are stored.

        Args:
            x: float32 or float64.
            tensor_scale: of formats that have one, float32 without dimensions; None = that of `x`.
        """

    @abstractmethod
    def scale_like(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return scales, all zero, of a tensor of this shape [..., L]."""

    @abstractmethod
    def cast(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the nearest values to `x` [..., L] at these scales, float32 (float64 of float64)."""

    @abstractmethod
    def encode_at(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of the nearest values to `x` at these scales, uint8 of its shape."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Return the values of an encoded tensor, float32."""

    def fake_quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        """Return the values of `x` [..., L] in this format, of its shape and type; `tensor_scale` as in `scales`."""
        x = torch.as_tensor(x).detach()
        wide = widened(x)
        return self.cast(wide, self.scales(wide, tensor_scale)).to(x.dtype)

    def encode(self, x: Tensor, tensor_scale: Tensor | None = None) -> Encoded:
        """Return codes and scales of `x` [..., L]; `tensor_scale` as in `scales`.

        Raises:
            QuantizationError: `x` holds NaN, which has no code.
        """
        wide = widened(torch.as_tensor(x).detach())
        if bool(wide.isnan().any()):
            raise QuantizationError(f"{self.name}: found NaN, which has no code")
        scales = self.scales(wide, tensor_scale)
        return Encoded(self.encode_at(wide, scales), scales)

    def blocks(self, length: int) -> int:
        """Return the number of blocks of a row of `length` values."""
        return -(-length // self.block) if self.block else 1


def widened(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if that is its type."""
    return x if x.dtype == torch.float64 else x.float()


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Return [..., L] as [..., blocks, size], filled up with zeros."""
    missing = -x.shape[-1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, size))


def in_rows(blocks: Tensor, length: int) -> Tensor:
    """Return [..., blocks, size] as [..., length], without what was filled up."""
    flat = blocks.flatten(-2)
    return flat if flat.shape[-1] == length else flat[..., :length]
