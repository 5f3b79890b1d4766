"""Quantizers of weights in number formats, and the choice between those of integers and of formats."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.affine import QRange
from ptq_exp.quantization.formats import FORMATS, BlockFormat, Encoded
from ptq_exp.quantization.formats.blocks import widened
from ptq_exp.quantization.quantizer.activation import ActivationQuantizer
from ptq_exp.quantization.quantizer.dynamic import DynamicQuantizer
from ptq_exp.quantization.quantizer.format_activation import (
    BlockActivationQuantizer,
    ElementwiseQuantizer,
    FloatActivationQuantizer,
)
from ptq_exp.quantization.quantizer.weight import WeightQuantizer
from ptq_exp.quantization.ranges.format_scale import search_scale
from ptq_exp.quantization.specs import TensorSpec


class _FormatWeightQuantizer(WeightQuantizer):
    """Quantizer of a weight whose nearest codes its format knows."""

    def _search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.codes(values)
        return found, self._values(found, values) != values


class FloatWeightQuantizer(ElementwiseQuantizer, _FormatWeightQuantizer):
    """Quantizer of a weight in a floating-point format, with a scale per range."""

    def __init__(self, name_of_format: str, **settings) -> None:
        super().__init__(FORMATS[name_of_format].bits, **settings | {"symmetric": True})
        self.format_name, self.format = name_of_format, FORMATS[name_of_format]

    def range_search(self, part: Tensor, metric: str) -> QRange:
        """Search the scales of a segment of the weight."""
        rows = part.flatten(1) if self.scale.shape[0] > 1 else part.reshape(1, -1)
        return self.range_of(search_scale(rows, self.format, metric, self.name))

    def units(self, weight: Tensor) -> Tensor:
        """Return what an element of 1 stands for, for each value of a `weight`, float64."""
        return self.cells(weight.float()).scale.double().expand(weight.shape)

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes nearest to `values` of the weight's shape, int32."""
        return self.format.encode(widened(values) / self.cells(values).scale).int()

    def _values(self, integers: Tensor, like: Tensor, rows: Tensor | None = None) -> Tensor:
        return (self.format.decode(integers) * self.cells(like).scale).to(like.dtype)


class BlockWeightQuantizer(_FormatWeightQuantizer):
    """Quantizer of a weight in a block format.

    Blocks lie along the input channels, of a convolution for each tap: along the sums of a multiplication, as those of
    its input. A format whose block is a whole row takes all that an output channel has. The scales are buffers, as
    they cannot be found anew from the quantized weight.

    Args:
        name_of_format: in `FORMATS`.
        shape: of the weight.
    """

    def __init__(self, name_of_format: str, *, shape: tuple[int, ...], **settings) -> None:
        super().__init__(FORMATS[name_of_format].bits, **settings | {"symmetric": True, "rows": 1, "segments": None})
        self.format_name, self.format = name_of_format, FORMATS[name_of_format]
        self.weight_shape = tuple(shape)
        scales = self.format.scale_like(tuple(self._along(torch.empty(shape, device="meta")).shape))
        for name, value in scales.items():
            self.register_buffer(name, value)
        self.scale_names = tuple(scales)
        self.scale.fill_(1.0)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The stored scales, by name."""
        return {name: getattr(self, name) for name in self.scale_names}

    @torch.no_grad()
    def search(self, weight: Tensor, metric: str) -> None:
        """Find the scales of `weight`; `metric` has no say in them."""
        self.check_fresh()
        if not bool(weight.isfinite().all()):
            raise QuantizationError(f"{self.name}: the weight holds NaN or infinity; check the checkpoint")
        for name, value in self.format.scales(widened(self._along(weight))).items():
            getattr(self, name).copy_(value)
        self.set_ready()

    def rounded(self, x: Tensor, row: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Return the weight's values in the format, at the stored scales."""
        return self._back(self.format.cast(widened(self._along(x)), self.scales)).to(x.dtype)

    @torch.no_grad()
    def off_grid(self, x: Tensor, row: Tensor | None = None) -> int:
        """As `Quantizer.off_grid`."""
        return int((self.rounded(x, None) != x).sum())

    def units(self, weight: Tensor) -> Tensor:
        """Return what an element of 1 stands for, for each value of a `weight`, float64."""
        return self._back(self.format.units(self.scales, tuple(self._along(weight).shape)))

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes nearest to `values` of the weight's shape, int32."""
        return self._back(self.format.encode_at(widened(self._along(values)), self.scales)).int()

    def stored_bytes(self, weight: Tensor) -> float:
        """Return the size of codes and scales."""
        along = self._along(weight)
        rows = along.numel() // along.shape[-1]
        scales = rows * self.format.scale_bits(along.shape[-1]) + 32 * self.format.tensor_scale
        return (weight.numel() * self.bits + scales) / 8

    def _values(self, integers: Tensor, like: Tensor, rows: Tensor | None = None) -> Tensor:
        codes = self._along(integers.to(torch.uint8))
        return self._back(self.format.decode(Encoded(codes, self.scales))).to(like.dtype)

    def _along(self, weight: Tensor) -> Tensor:
        """Return the weight with the values that share scales along the last axis."""
        return weight.flatten(1) if self.format.block is None else weight.movedim(1, -1)

    def _back(self, values: Tensor) -> Tensor:
        return values.view(self.weight_shape) if self.format.block is None else values.movedim(-1, 1)


def activation_quantizer(
    spec: TensorSpec, *, axis: int = -1, name: str = "", segments: tuple[int, ...] | None = None, linear: bool = False,
    non_negative: bool = False,
) -> ActivationQuantizer:
    """Make the quantizer of an activation: of integers, or of a number format.

    Args:
        spec: its dynamic ranges are those of inputs of linear layers, all else has one for each sample. Formats of
            blocks have scales that follow the data anyway.
        linear: what a linear layer reads.
        non_negative: of a tensor without negative values, see `DynamicQuantizer`.
    """
    settings = {"symmetric": spec.symmetric, "metric": spec.metric, "axis": axis, "name": name}
    blocks = isinstance(spec.format, BlockFormat)
    if spec.dynamic is not None and not blocks:
        share = spec.dynamic if linear else "tensor"
        return DynamicQuantizer(spec.bits, share=share, non_negative=non_negative, **settings)
    kind = ActivationQuantizer if spec.format is None else FloatActivationQuantizer
    kind = BlockActivationQuantizer if blocks else kind
    return kind(spec.bits, headroom=spec.headroom, bins=spec.bins, segments=segments, **settings)


def weight_quantizer(bits: int | str, shape: tuple[int, ...], **settings) -> WeightQuantizer:
    """Make the quantizer of a weight of this shape: of integers, or of a number format."""
    if not isinstance(bits, str):
        return WeightQuantizer(bits, **settings)
    if isinstance(FORMATS[bits], BlockFormat):
        return BlockWeightQuantizer(bits, shape=shape, **settings)
    return FloatWeightQuantizer(bits, **settings)


def format_of(quantizer: object) -> str:
    """Return the name of the number format of a quantizer; "" of integers, or where there is none."""
    return getattr(quantizer, "format_name", "")
