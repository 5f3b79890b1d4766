"""Formats with a float scale per block: signed integers, and NF4, whose levels are those of a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ptq_exp.quantization.formats.blocks import BlockFormat, Encoded, in_blocks, in_rows

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""Quantiles of the normal distribution scaled to [-1, 1], zero among them (QLoRA, Dettmers et al. 2023, appendix E)."""


@dataclass(frozen=True)
class ScaledBlocks(BlockFormat):
    """A format of elements times a float scale per block, which is stored in `scale_dtype`."""

    scale_dtype: torch.dtype

    def scale_bits(self, length: int) -> int:
        """Return the bits of one scale for each block."""
        return torch.finfo(self.scale_dtype).bits * self.blocks(length)

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Return the block scales, [..., blocks] in `scale_dtype`."""
        return {"block_scale": self._scale(in_blocks(x, self.block)).to(self.scale_dtype)}

    def scale_like(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return scales of zero."""
        return {"block_scale": torch.zeros(*shape[:-1], self.blocks(shape[-1]), dtype=self.scale_dtype)}

    def cast(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the nearest values at these scales."""
        scale = scales["block_scale"].to(x.dtype).unsqueeze(-1)
        return in_rows(self._nearest(_divided(in_blocks(x, self.block), scale)) * scale, x.shape[-1])

    def encode_at(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of the nearest elements at these scales."""
        scale = scales["block_scale"].to(x.dtype).unsqueeze(-1)
        return in_rows(self._code(_divided(in_blocks(x, self.block), scale)), x.shape[-1])

    def decode(self, encoded: Encoded) -> Tensor:
        """Return element times scale."""
        elements = in_blocks(self.values.to(encoded.codes.device)[encoded.codes.long()].float(), self.block)
        return in_rows(elements * encoded.scales["block_scale"].float().unsqueeze(-1), encoded.codes.shape[-1])

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The value of every code of an element, float64."""

    @abstractmethod
    def _scale(self, blocks: Tensor) -> Tensor:
        """Return the scale of [..., size]."""

    @abstractmethod
    def _nearest(self, ratio: Tensor) -> Tensor:
        """Return the nearest elements."""

    @abstractmethod
    def _code(self, ratio: Tensor) -> Tensor:
        """Return the codes of the nearest elements, uint8."""


@dataclass(frozen=True)
class IntegerGroups(ScaledBlocks):
    """Signed integers in two's complement, times a scale per block.

    Attributes:
        width: bits of an integer, 2 to 8.
        signed_scale: the entry of largest magnitude, whatever its sign, is the lowest integer -2^(b-1), so that the
            scale may be negative and all levels are used; False = scale amax / (2^(b-1) - 1), without the lowest one.
    """

    width: int
    signed_scale: bool = False

    @property
    def bits(self) -> int:
        """Bits of an integer."""
        return self.width

    @property
    def values(self) -> Tensor:
        """The integer of every code, float64 [2^bits]."""
        code = torch.arange(1 << self.width)
        return (code - (code >> self.width - 1 << self.width)).double()

    @property
    def elements(self) -> Tensor:
        """As `BlockFormat.elements`: the lowest integer is one with `signed_scale` alone."""
        return torch.unique(self._nearest(self.values))

    def _scale(self, blocks: Tensor) -> Tensor:
        if not self.signed_scale:
            return blocks.abs().amax(-1) / (2 ** (self.width - 1) - 1)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return extreme / -(2 ** (self.width - 1))

    def _nearest(self, ratio: Tensor) -> Tensor:
        top = 2 ** (self.width - 1) - 1
        return ratio.round().clamp_(-top - self.signed_scale, top)

    def _code(self, ratio: Tensor) -> Tensor:
        return (self._nearest(ratio).to(torch.int32) & (1 << self.width) - 1).to(torch.uint8)


@dataclass(frozen=True)
class TableFormat(ScaledBlocks):
    """The nearest of `levels`, ascending in [-1, 1], times the largest magnitude of the block."""

    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def values(self) -> Tensor:
        """The value of every code, float64."""
        return torch.tensor(self.levels, dtype=torch.float64)

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1)

    def _nearest(self, ratio: Tensor) -> Tensor:
        return self.values.to(ratio)[self._code(ratio).long()].where(~ratio.isnan(), ratio)

    def _code(self, ratio: Tensor) -> Tensor:
        between = (self.values[1:] + self.values[:-1]) / 2
        return torch.bucketize(ratio.contiguous(), between.to(ratio)).to(torch.uint8)


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Divide by scales; by 0 gives zeros."""
    return torch.where(scale == 0, 0.0, blocks / torch.where(scale == 0, 1.0, scale))


_GROUPS = {f"int{width}_g{size}": IntegerGroups(f"int{width}_g{size}", size, torch.float16, width)
           for width in (4, 3, 2) for size in (16, 32, 64, 128)}
_SIGNED = {f"int{width}_g32_signed": IntegerGroups(f"int{width}_g32_signed", 32, torch.float16, width, True)
           for width in (4, 2)}
TABLES: dict[str, ScaledBlocks] = {
    "nf4": TableFormat("nf4", 64, torch.float32, NF4_LEVELS), **_GROUPS, **_SIGNED,
}
