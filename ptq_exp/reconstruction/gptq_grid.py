"""The levels that GPTQ may choose for each weight: those of integers, or the elements of a number format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq_exp.quantization.affine import QRange
from ptq_exp.quantization.quantizer.formats import BlockWeightQuantizer, FloatWeightQuantizer
from ptq_exp.quantization.quantizer.weight import WeightQuantizer
from ptq_exp.reconstruction.hessian import grouped


class Levels(NamedTuple):
    """The grid of each weight, counted from the zero point: `scale` times an integer from `lowest` to `highest`.

    All float64 [groups, out, in], or as `columns_first` and `row` give them.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Return the levels nearest to `values`, ties to even."""
        return torch.div(values, self.scale).round_().clamp_(self.lowest, self.highest)

    def columns_first(self, order: Tensor) -> Levels:
        """Return the grid of the columns in this order [groups, in], as [groups, in, out]."""
        return Levels(*(columns_first(part, order) for part in self))

    def row(self, number: int) -> Levels:
        """Return the grid of one row of each group."""
        return Levels(*(part[:, number] for part in self))


class Elements(NamedTuple):
    """The grid of each weight in a number format: `scale` times one of `values`.

    Attributes:
        scale: float64 [groups, out, in]; of blocks, that of the block a weight lies in. 0 where a block is zero.
        values: ascending, float64 [n].
    """

    scale: Tensor
    values: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Return the elements nearest to `values`; the lower one of two as near."""
        ratio = torch.where(self.scale == 0, 0.0, values / torch.where(self.scale == 0, 1.0, self.scale))
        between = (self.values[1:] + self.values[:-1]) / 2
        return self.values[torch.bucketize(ratio.contiguous(), between)]

    def columns_first(self, order: Tensor) -> Elements:
        """Return the grid of the columns in this order [groups, in], as [groups, in, out]."""
        return Elements(columns_first(self.scale, order), self.values)

    def row(self, number: int) -> Elements:
        """Return the grid of one row of each group."""
        return Elements(self.scale[:, number], self.values)


def grid_of(layer: nn.Module, weight: Tensor) -> Levels | Elements:
    """Return the grid of the `weight` of a quantized layer, whose ranges are chosen.

    Raises:
        QuantizationError: a number format whose elements differ from row to row.
    """
    quantizer: WeightQuantizer = layer.weight_quantizer
    if isinstance(quantizer, BlockWeightQuantizer | FloatWeightQuantizer):
        return Elements(grouped(layer, quantizer.units(weight)), quantizer.format.elements.to(weight.device))
    # in float64 first: a view of equal columns stays one
    parts = (part.double().expand(weight.shape) for part in quantizer.cells(weight.float()))
    cells = QRange(*(grouped(layer, part) for part in parts))
    return Levels(cells.scale, cells.qmin - cells.zero_point, cells.qmax - cells.zero_point)


def put_(layer: nn.Module, grid: Levels | Elements, levels: Tensor) -> None:
    """Give a quantized layer the weight of these `levels` of its `grid`, [groups, out, in]."""
    shape = layer.weight.shape
    if isinstance(grid, Levels):
        codes = (levels - grid.lowest).to(torch.int32).reshape(shape)
    else:
        codes = layer.weight_quantizer.codes((levels * grid.scale).reshape(shape).to(layer.weight))
    layer.weight_quantizer.restore(layer.weight, codes)


def columns_first(values: Tensor, order: Tensor) -> Tensor:
    """Return ``values`` [groups, out, in] as [groups, in, out], the columns of each group in `order` [groups, in]."""
    if values.stride(-1) == 0:  # all columns are the same
        return values.mT
    # turned before rows are picked: that reads memory in order
    return torch.stack([part.T.contiguous()[index] for part, index in zip(values, order, strict=True)])
