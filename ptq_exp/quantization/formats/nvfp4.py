"""NVFP4: blocks of 16 values in fp4 e2m1 with a scale in fp8 e4m3, and one float32 scale of the whole tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.quantization.formats.blocks import BlockFormat, Encoded, in_blocks, in_rows, widened
from ptq_exp.quantization.formats.elementwise import ELEMENTWISE

ELEMENT, SCALE = ELEMENTWISE["fp4_e2m1"], ELEMENTWISE["fp8_e4m3fn"]


@dataclass(frozen=True)
class NVFP4Format(BlockFormat):
    """Elements times the block's scale times the tensor's: amax of the block / 6, in e4m3 in units of the latter.

    Elements are chosen with the rounded scale. Blocks whose scale rounds to zero are zeros that keep their signs.

    Attributes:
        two_level: the tensor has a scale, amax / (6 * 448), so that the largest block scale is the largest of e4m3;
            False = that of the tensor is 1, and larger values than 6 * 448 saturate.
        tops: what the largest value of a block may become: that with the least squared error of the block is taken.
            (6, 4) is "four over six" (Cook et al. 2025): 4 leaves no gap as wide as that between 4 and 6.
    """

    two_level: bool = True
    tops: tuple[float, ...] = (ELEMENT.largest,)

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return ELEMENT.bits

    @property
    def values(self) -> Tensor:
        """The value of every code of an element, float64 [16]."""
        return ELEMENT.values

    @property
    def tensor_scale(self) -> bool:
        """Whether the tensor has a scale."""
        return self.two_level

    def scale_bits(self, length: int) -> int:
        """Return 8 bits for each block."""
        return 8 * self.blocks(length)

    def scale_of(self, amax: Tensor) -> Tensor:
        """Return the scale of a tensor with this largest magnitude, float32; 1 where it is zero."""
        scale = amax.float() / (ELEMENT.largest * SCALE.largest)
        return torch.where(scale > 0, scale, 1.0)

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Return codes of e4m3, uint8 [..., blocks], and the scale of the tensor where there is one."""
        scale = self._tensor_scale(x, tensor_scale)
        found = {"block_scale": SCALE.encode(self._best(in_blocks(x, self.block), scale, rounds=False)[0])}
        return found if scale is None else found | {"tensor_scale": scale}

    def fake_quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        """Return the values of `x` [..., L] in this format; the same as by way of codes, which here nobody needs."""
        x = torch.as_tensor(x).detach()
        wide = widened(x)
        found = self._best(in_blocks(wide, self.block), self._tensor_scale(wide, tensor_scale))[1]
        return in_rows(found, x.shape[-1]).to(x.dtype)

    def _tensor_scale(self, x: Tensor, given: Tensor | None) -> Tensor | None:
        if not self.two_level:
            return None
        if given is None:
            given = self.scale_of(x.abs().amax() if x.numel() else x.new_zeros(()))
        return given.float().reshape(())

    def _best(self, blocks: Tensor, tensor_scale: Tensor | None, *, rounds: bool = True) -> tuple[Tensor, Tensor]:
        """Return scales in e4m3 [..., blocks], of each block that of the best of `tops`, and the rounded `blocks`.

        Args:
            rounds: False = the second may be `blocks` themselves.
        """
        amax, found = blocks.abs().amax(-1).float(), []
        for top in self.tops:
            scale = SCALE.cast(amax / top if tensor_scale is None else amax / top / tensor_scale)
            if len(self.tops) == 1 and not rounds:
                return scale, blocks
            joined = (scale if tensor_scale is None else scale * tensor_scale).unsqueeze(-1)
            found.append((scale, ELEMENT.cast(_divided(blocks, joined)) * joined))
        scale, values = found[0]
        if len(found) == 1:
            return scale, values
        error = _squared(values, blocks)
        for other, rounded in found[1:]:
            tried = _squared(rounded, blocks)
            better = tried < error
            scale, error = torch.where(better, other, scale), torch.where(better, tried, error)
            values = torch.where(better.unsqueeze(-1), rounded, values)
        return scale, values

    def scale_like(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return codes of zero, and a tensor's scale of zero where it has one."""
        found = {"block_scale": torch.zeros(*shape[:-1], self.blocks(shape[-1]), dtype=torch.uint8)}
        return found | ({"tensor_scale": torch.zeros(())} if self.two_level else {})

    def cast(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the nearest values at these scales."""
        scale = self._joined(scales)
        return in_rows(ELEMENT.cast(_divided(in_blocks(x, self.block), scale)) * scale, x.shape[-1])

    def encode_at(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of the nearest elements at these scales."""
        scale = self._joined(scales)
        return in_rows(ELEMENT.encode(_divided(in_blocks(x, self.block), scale)), x.shape[-1])

    def decode(self, encoded: Encoded) -> Tensor:
        """Return element times block scale times tensor scale."""
        elements = in_blocks(ELEMENT.decode(encoded.codes), self.block)
        return in_rows(elements * self._joined(encoded.scales), encoded.codes.shape[-1])

    def off_grid(self, x: Tensor, tensor_scale: Tensor) -> int:
        """Count the elements of `x` [..., L] in blocks that no block scale gives, with this scale of the tensor."""
        blocks = in_blocks(x.float(), self.block)
        amax = blocks.abs().amax(-1)
        fits = amax == 0
        for element in ELEMENT.values[1 : 1 << ELEMENT.bits - 1].tolist():  # one of them is the largest of the block
            scale = SCALE.cast(amax / element / tensor_scale).unsqueeze(-1) * tensor_scale
            fits |= (_divided(blocks, scale) * 0 + ELEMENT.cast(_divided(blocks, scale)) * scale == blocks).all(-1)
        return int((~fits).sum()) * self.block

    def _joined(self, scales: Mapping[str, Tensor]) -> Tensor:
        """Block scale times tensor scale, [..., blocks, 1]."""
        scale = SCALE.decode(scales["block_scale"])
        return (scale * scales["tensor_scale"] if self.two_level else scale).unsqueeze(-1)


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Divide by scales; by 0 gives zeros that keep the sign."""
    zero = scale == 0
    return (blocks / torch.where(zero, 1.0, scale)).mul_(~zero)


def _squared(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared distance of each block."""
    return (one - other).square_().sum(-1)


_FOUR_OVER_SIX = (6.0, 4.0)
_MADE = (
    NVFP4Format("nvfp4", 16), NVFP4Format("nvfp4_one_level", 16, two_level=False),
    NVFP4Format("nvfp4_4over6", 16, tops=_FOUR_OVER_SIX),
    NVFP4Format("nvfp4_4over6_one_level", 16, two_level=False, tops=_FOUR_OVER_SIX),
)
NVFP4 = {made.name: made for made in _MADE}
