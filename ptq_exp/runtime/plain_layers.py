"""Layers in plain operations that engines recognise: the meaning of every layer's integers.

Three kinds of operations carry the quantization: `torch.fake_quantize_per_tensor_affine` on activations, int8 buffers
times a scale as weights, and sums. Engines turn the first two into 8-bit kernels; here, in torch, they compute what the
simulation does, to the rounding of float32. Grids of more than 8 bits are written out, as some engines add the zero
point before they round.

Where several rows of ranges exist (bins of sampling steps, candidate widths) the row is an input of the network. No
engine quantizes by ranges that are inputs; but x = s (u - z) with u on the constant grid 0..255 gives

    conv(x, w) = s (conv(u, w) - z conv(1, w)),

where the last convolution is of constants: with zero padding it is one number per position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_exp.quantization.quantizer import Quantizer
from ptq_exp.runtime.integers import BYTE, Grid, IntegerWeight
from ptq_exp.runtime.operators import dequantized, on_byte_grid
from ptq_exp.runtime.plan import LayerPlan
from ptq_exp.runtime.sixteen_bits import multiplication_of, stored


class Row(nn.Module):
    """The row of ranges in force, int64 [1]: set by `Deployable` from its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None


class GridQuantizer(nn.Module):
    """Quantizes an activation to one grid: a constant one, or a row of several."""

    def __init__(self, grid: Grid, row: Row) -> None:
        super().__init__()
        self.row, self.rows, self.levels = [row], grid.rows, grid.levels  # a list: the row is no child
        for name in ("scale", "lowest", "highest"):
            self.register_buffer(name, getattr(grid, name))
        # a grid of no more than 8 bits whose zero is an integer 0 of a signed byte stays so, others start from 0
        self.signed = grid.symmetric and not grid.one_sided
        self.constant_zero = grid.symmetric or grid.one_sided
        self.constant = (float(grid.scale[0]), int(grid.lowest[0]), int(grid.highest[0]))  # where there is one row

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of `x` on the grid, of its shape."""
        if self.levels > BYTE:
            scale, lowest, highest = (self._in_force(name) for name in ("scale", "lowest", "highest"))
            return torch.minimum(torch.maximum((x / scale).round(), lowest), highest) * scale
        if self.rows == 1:
            return self._constant(x)
        u, scale, zero = self.integers(x)
        return (u - zero) * scale

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(u, scale, zero) with the values scale * (u - zero), u on the constant grid of a byte; of several rows."""
        scale, lowest, highest = (self._in_force(name) for name in ("scale", "lowest", "highest"))
        if self.signed:
            bounded = torch.minimum(torch.maximum(x / scale, lowest), highest)
            return on_byte_grid(bounded, 1.0, 0, -(BYTE // 2)), scale, torch.zeros_like(scale)
        bounded = torch.minimum(torch.maximum(x / scale - lowest, torch.zeros_like(scale)), highest - lowest)
        return on_byte_grid(bounded, 1.0, 0, 0), scale, -lowest

    def _constant(self, x: Tensor) -> Tensor:
        """Round on all levels of a byte, the only grid that engines know; fewer levels clip before."""
        scale, low, high = self.constant
        first, zero = (-(BYTE // 2), 0) if self.signed else (0, -low)
        if (low + zero, high + zero) != (first, first + BYTE - 1):
            x = x.clamp(low * scale, high * scale)
        return on_byte_grid(x, scale, zero, first)

    def _in_force(self, name: str) -> Tensor:
        values = getattr(self, name)
        return values if self.rows == 1 else values.index_select(0, self.row[0].value)


class Multiplication(nn.Module):
    """Multiplies one segment of an input by its int8 weight; without bias.

    Args:
        layer: the convolution or linear layer, for its stride, padding, dilation and groups.
    """

    def __init__(self, layer: nn.Module, weight: IntegerWeight, grid: Grid, row: Row) -> None:
        super().__init__()
        self.quantizer = GridQuantizer(grid, row)
        self.groups, self.shifted = getattr(layer, "groups", 1), weight.shifted
        self.function, self.settings = multiplication_of(layer)
        self._of_ones: dict[tuple[int, ...], Tensor] = {}
        levels, scale, offset = weight.levels, weight.scale, weight.offset.float() * weight.scale
        if self.shifted:  # one more output channel, of ones, in each group
            levels, scale = _with_ones(levels, self.groups), _with_ones(scale, self.groups)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale.view(-1, *[1] * (levels.ndim - 1)))
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, ...] or [..., C_in] -> the product, of the same layout."""
        if self.quantizer.rows == 1:
            return self._product(self.quantizer(x))
        u, scale, zero = self.quantizer.integers(x)
        return (self._product(u) - zero * self._product_of_ones(x)) * scale

    def _product_of_ones(self, x: Tensor) -> Tensor:
        """Return the product of an input of ones of the shape of `x`; kept, so that a traced network has a constant."""
        shape = [1] * (x.ndim - 1) + [x.shape[-1]] if not self.settings else [1, *x.shape[1:]]
        key = tuple(int(size) for size in shape)
        if key not in self._of_ones:
            self._of_ones[key] = self._product(torch.ones(key))
        return self._of_ones[key]

    def _product(self, x: Tensor) -> Tensor:
        return self._unshifted(self.function(x, dequantized(self.levels, self.scale), **self.settings))

    def _unshifted(self, y: Tensor) -> Tensor:
        """Return the product by the weight itself, made of that by its levels and by the channel of ones."""
        if not self.shifted:
            return y
        # the sum of the inputs under the kernel, times the offset of each channel
        axis = -1 if self.function is nn.functional.linear else 1
        if self.groups == 1:
            channels = len(self.offset)
            own, ones = y.narrow(axis, 0, channels), y.narrow(axis, channels, 1)
            return own + ones * self.offset.view([-1] if axis == -1 else [-1, *[1] * (y.ndim - 2)])
        y = y.unflatten(1, (self.groups, -1))
        own, ones = y[:, :, :-1], y[:, :, -1:]
        return (own + ones * self.offset.view(self.groups, -1, *[1] * (y.ndim - 3))).flatten(1, 2)


def _with_ones(values: Tensor, groups: int) -> Tensor:
    """`values` [out_channels, ...] with one more row of ones at the end of each of `groups` groups."""
    grouped = values.unflatten(0, (groups, -1))
    return torch.cat((grouped, torch.ones_like(grouped[:, :1])), 1).flatten(0, 1)


class IntegerLayer(nn.Module):
    """A convolution or linear layer as the sum over its segments of integer multiplications."""

    multiplication: type[Multiplication] = Multiplication

    def __init__(self, layer: nn.Module, plan: LayerPlan, row: Row) -> None:
        super().__init__()
        self.segments = list(plan.segments)
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.parts = nn.ModuleList(
            self.multiplication(layer, weight, grid, row)
            for weight, grid in zip(plan.weights, plan.inputs, strict=True)
        )
        bias = layer.bias
        shape = (-1,) if self.axis == -1 else (-1, *[1] * (layer.weight.ndim - 2))
        self.register_buffer("bias", None if bias is None else bias.detach().view(shape))
        self.output = nn.Identity() if plan.output is None else GridQuantizer(plan.output, row)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        inputs = x.split(self.segments, self.axis) if self.segments else (x,)
        y = self.parts[0](inputs[0])
        for part, piece in zip(self.parts[1:], inputs[1:], strict=True):
            y = y + part(piece)
        return self.output(y if self.bias is None else y + self.bias)


class FloatLayer(nn.Module):
    """A layer that no 8-bit kernel executes: float arithmetic on quantized operands, their rounding kept."""

    def __init__(self, layer: nn.Module, plan: LayerPlan, row: Row) -> None:
        super().__init__()
        self.segments, self.axis = list(plan.segments), -1 if isinstance(layer, nn.Linear) else 1
        self.inputs = nn.ModuleList(GridQuantizer(grid, row) for grid in plan.inputs)
        self.output = nn.Identity() if plan.output is None else GridQuantizer(plan.output, row)
        quantized = isinstance(layer.weight_quantizer, Quantizer)
        self.layer = _plain(layer) if quantized else stored(_plain(layer))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        if self.inputs:
            pieces = x.split(self.segments, self.axis) if self.segments else (x,)
            pieces = [grid(piece) for grid, piece in zip(self.inputs, pieces, strict=True)]
            x = torch.cat(pieces, self.axis) if len(pieces) > 1 else pieces[0]
        return self.output(self.layer(x))


def _plain(layer: nn.Module) -> nn.Module:
    """Make the layer with its frozen weight and without quantizers."""
    if isinstance(layer, nn.Linear):
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        made = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                    layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode)
    with torch.no_grad():
        made.weight.copy_(layer.weight_quantizer(layer.weight))
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made
