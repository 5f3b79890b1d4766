"""Quantizers of activations in number formats: value by value with calibrated scales, or block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.quantization.affine import SCALE_FLOOR, QRange, straight_through
from ptq_exp.quantization.formats import FORMATS, FloatFormat, limits
from ptq_exp.quantization.formats.blocks import widened
from ptq_exp.quantization.quantizer.activation import ActivationQuantizer
from ptq_exp.quantization.quantizer.base import Quantizer
from ptq_exp.quantization.ranges.format_scale import sketch_scale
from ptq_exp.quantization.ranges.range_search import RangeSketch


class ElementwiseQuantizer(Quantizer):
    """What quantizers of a `FloatFormat` have in common: x is scale * cast(x / scale), qmin and qmax its limits."""

    format: FloatFormat

    def rounded(self, x: Tensor, row: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Return `x` as values of the format times the scale; gradients as `straight_through`."""
        scale = self.cells(x, row).scale
        ratio = widened(x.detach()) / scale
        found = (self.format.cast(ratio) * scale).to(x.dtype)
        if not self.format.nan:
            found = torch.where(x.isnan(), x.detach(), found)  # NaN is to be seen, not to become 0
        return straight_through(x, found, kept, ratio.abs() <= self.format.largest if x.requires_grad else None)

    @torch.no_grad()
    def off_grid(self, x: Tensor, row: Tensor | None = None) -> int:
        """As `Quantizer.off_grid`."""
        return int((self.rounded(x, row) != x).sum())

    def range_of(self, scale: Tensor) -> QRange:
        """Return the range of this scale."""
        scale = scale.clamp(min=SCALE_FLOOR)
        return QRange(scale, torch.zeros_like(scale), *limits(self.format, scale))


class FloatActivationQuantizer(ActivationQuantizer, ElementwiseQuantizer):
    """Quantizer of activations in a floating-point format, with calibrated scales."""

    def __init__(self, name_of_format: str, **settings) -> None:
        super().__init__(FORMATS[name_of_format].bits, **settings | {"symmetric": True})
        self.format_name, self.format = name_of_format, FORMATS[name_of_format]

    def found(self, sketch: RangeSketch, bits: int, metric: str) -> QRange:
        """Return the range of what a sketch saw."""
        return self.range_of(sketch_scale(sketch, self.format, metric))


class BlockActivationQuantizer(ActivationQuantizer):
    """Quantizer of activations in a block format, whose scales follow the data.

    Blocks lie along `axis` and within a sample. Nothing is calibrated, but for the scale of the tensor where the format
    has one: that of a batch would depend on what else is in it.
    """

    dynamic = True

    def __init__(self, name_of_format: str, **settings) -> None:
        settings |= {"symmetric": True, "segments": None, "bins": 1}
        super().__init__(FORMATS[name_of_format].bits, **settings)
        self.format_name, self.format = name_of_format, FORMATS[name_of_format]
        if not self.format.tensor_scale:
            self.set_range(self._range(torch.ones(())))

    def rounded(self, x: Tensor, row: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Return the values of `x` in the format; gradients as `straight_through`."""
        scale = self.scale.reshape(()) if self.format.tensor_scale else None
        found = self.format.fake_quantize(x.movedim(self.axis, -1), scale).movedim(-1, self.axis)
        return straight_through(x, found, kept)

    @torch.no_grad()
    def off_grid(self, x: Tensor, row: Tensor | None = None) -> int:
        """As `Quantizer.off_grid`; `x` is laid out as what the quantizer returned."""
        along = x.movedim(self.axis, -1)
        off = self.rounded(x, None).movedim(self.axis, -1) != along
        if not self.format.tensor_scale or not bool(off.any()):
            return int(off.sum())
        # a block scale below the normal numbers is rounded otherwise when it is found a second time
        return self.format.off_grid(along, self.scale.reshape(()))

    @property
    def needs_data(self) -> bool:
        """Whether the tensor has a scale, which has to be calibrated."""
        return self.format.tensor_scale

    def found(self, sketch: RangeSketch, bits: int, metric: str) -> QRange:
        """Return the range whose scale is that of the largest magnitude which a sketch saw."""
        return self._range(self.format.scale_of(torch.maximum(sketch.max, -sketch.min)))

    def _range(self, scale: Tensor) -> QRange:
        return QRange(scale, torch.zeros_like(scale), *limits(self.format, scale))
