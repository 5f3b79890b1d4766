"""Quantizers of activations whose ranges are those of the very values that pass: nothing is calibrated.

A range belongs to one sample at most, so that what an image becomes does not depend on its batch. It covers all
values: nothing is clipped. Symmetric: scale = largest magnitude / (2^(b-1) - 1), levels to both sides alike.
Asymmetric: the range is widened to hold zero, the zero point is an integer from 0 to 2^b - 1. Floating-point formats:
scale = largest magnitude / largest value of the format. Rounding is to nearest, ties to even.

NaN and infinity make NaN of what shares their range, and of nothing else. Scales are computed in float32 and are no
smaller than its least normal number: a range of zeros gives zeros, one of subnormal numbers loses less than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.quantization.affine import QRange, integer_range, straight_through
from ptq_exp.quantization.formats import FORMATS, limits
from ptq_exp.quantization.quantizer.activation import ActivationQuantizer
from ptq_exp.quantization.quantizer.base import off_levels

Share = str | int
"""What has a range of its own: each sample ("tensor"), each position ("token"), or so many channels of a position."""


def extremes(x: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Return smallest and largest value of what shares a range, in shapes that broadcast against `x`; not of 0 values.

    Args:
        x: [N, ...]; channels on the last axis for "token" and groups, of which the last may be smaller.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if share == "tensor" and x.ndim > 1:
        return tuple(end.reshape(-1, *[1] * (x.ndim - 1)) for end in x.reshape(len(x), -1).aminmax(dim=1))
    if share in ("tensor", "token"):
        return tuple(x.aminmax(dim=-1, keepdim=True))
    ends = zip(*(part.aminmax(dim=-1, keepdim=True) for part in x.split(share, -1)), strict=True)
    group = torch.arange(x.shape[-1], device=x.device) // share
    return tuple(torch.cat(end, -1).index_select(-1, group) for end in ends)


def range_of(low: Tensor, high: Tensor, bits: int, *, symmetric: bool, non_negative: bool = False) -> QRange:
    """Return the range that covers [low, high]; `non_negative`: levels of a symmetric one from 0 on alone."""
    least = torch.finfo(low.dtype).tiny
    zero = low.new_zeros(())
    if symmetric and not non_negative:
        top = 2 ** (bits - 1) - 1
        scale = torch.maximum(-low, high).div(top).clamp(min=least)
        return QRange(scale, zero, zero - top, zero + top)
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high / top - low / top).clamp(min=least)  # the difference itself may be infinite
    return QRange(scale, (-low / scale).round().clamp(0, top), zero, zero + top)


class DynamicQuantizer(ActivationQuantizer):
    """Quantizer of activations that finds the range of what passes it, each time; see above.

    Args:
        bits: width of the integer, or the name of a floating-point format in `FORMATS`.
        share: what has a range of its own.
        non_negative: of a tensor without negative values, such as a softmax map: a symmetric range has no others.
        settings: as for `Quantizer`, without `rows` and `segments`.
    """

    dynamic = True

    def __init__(self, bits: int | str, *, share: Share, non_negative: bool = False, **settings) -> None:
        made = FORMATS[bits] if isinstance(bits, str) else None
        symmetric = settings.pop("symmetric", False) or made is not None
        super().__init__(bits if made is None else made.bits, symmetric=symmetric, **settings)
        self.share, self.non_negative, self.format = share, non_negative, made
        if made is not None:
            self.format_name = bits
        # in place of a range: the grid of scale 1
        one = torch.ones(())
        ends = limits(made, one) if made else integer_range(self.bits, symmetric and not non_negative)
        self.set_range(QRange(one, 0 * one, *ends))

    def cells(self, x: Tensor, row: Tensor | None = None) -> QRange:
        """Return the range of each element of `x`, in shapes that broadcast against it."""
        low, high = extremes(x.detach(), self.share)
        if self.format is None:
            return range_of(low, high, self.bits, symmetric=self.symmetric, non_negative=self.non_negative)
        scale = torch.maximum(-low, high).div(self.format.largest).clamp(min=torch.finfo(low.dtype).tiny)
        return QRange(scale, low.new_zeros(()), *limits(self.format, low.new_ones(())))

    def rounded(self, x: Tensor, row: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Return `x` on the grid of its own ranges; `kept` as in `fake_quantize`."""
        if x.numel() == 0:
            return x
        if self.format is None:
            return super().rounded(x, row, kept)
        scale = self.cells(x).scale
        values = self.format.cast(x.detach().to(scale.dtype) / scale) * scale
        return straight_through(x, values, kept).to(x.dtype)

    def returned_off_grid(self, x: Tensor, y: Tensor) -> int:
        """As `Quantizer.returned_off_grid`: the ranges are those of `x`."""
        if y.numel() == 0:
            return 0
        return int((self.rounded(x, None) != y).sum()) if self.format else off_levels(y, self.cells(x))

    @property
    def needs_data(self) -> bool:
        """Return False: nothing is calibrated."""
        return False

    def extra_repr(self) -> str:
        """Return the settings shown by ``print(model)``."""
        return f"bits={self.bits}, symmetric={self.symmetric}, share={self.share}, mode={self.mode.value}"
