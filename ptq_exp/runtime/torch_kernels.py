"""Integer multiplications by torch's own operators: oneDNN's on CPUs, `torch._int_mm` on NVIDIA GPUs.

Activations are levels u of an unsigned byte, from 0 on, with the zero point z: both compute
x_scale * w_scale * sum((u - z) * level), in 32-bit integers but for the scales. Where the input is padded, zeros are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_exp.runtime.integers import BYTE, Grid, IntegerWeight
from ptq_exp.runtime.plain_layers import IntegerLayer, Multiplication, Row
from ptq_exp.runtime.plan import LayerPlan

_ROWS, _MULTIPLE = 32, 8
"""Least number of rows, and factor of the other sizes, that `torch._int_mm` takes on a GPU."""


class _Levels(Multiplication):
    """Multiplies levels by levels; `_integers` does."""

    def __init__(self, layer: nn.Module, weight: IntegerWeight, grid: Grid, row: Row) -> None:
        super().__init__(layer, weight, grid, row)
        columns = (column.tolist() for column in (grid.scale, grid.lowest, grid.highest))
        self.ranges = [(scale, int(low), int(high)) for scale, low, high in zip(*columns, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, ...] or [..., C_in] -> the product, of the same layout."""
        row = 0 if len(self.ranges) == 1 else int(self.quantizer.row[0].value)
        scale, low, high = self.ranges[row]
        # a signed byte: torch converts floats into it several times faster than into an unsigned one
        signed = (x / scale).round_().clamp_(low, high).sub_(low + BYTE // 2).to(torch.int8)
        return self._unshifted(self._integers(signed, scale, -low))

    def _integers(self, signed: Tensor, scale: float, zero: int) -> Tensor:
        """Multiply the levels u, given as u - 128, whose zero point is `zero`."""
        raise NotImplementedError


class OneDNN(_Levels):
    """Multiplies by oneDNN's 8-bit kernels on CPUs, weights packed once; convolutions in channels-last order."""

    def __init__(self, layer: nn.Module, weight: IntegerWeight, grid: Grid, row: Row) -> None:
        super().__init__(layer, weight, grid, row)
        self.line = isinstance(layer, nn.Conv1d)
        self.channel_scale = self.scale.flatten().contiguous()
        self.zeros = torch.zeros(len(self.channel_scale), dtype=torch.int64)
        self.register_buffer("bias", None)  # float32 [out_channels], added by the kernel
        self._packed: dict[bool, Tensor] = {}  # by whether there is a zero point, which changes the layout
        if self.settings:
            names = ("stride", "padding", "dilation")
            self.geometry = [list(self.settings[name]) for name in names]
            if self.line:
                self.geometry = [[first, *value] for first, value in zip((1, 0, 1), self.geometry, strict=True)]

    def _integers(self, signed: Tensor, scale: float, zero: int) -> Tensor:
        u = signed.view(torch.uint8).bitwise_xor_(BYTE // 2)
        packed, weight = self._weight(scale, zero), (self.channel_scale, self.zeros, self.bias)
        how = (1.0, 0, torch.float32, "none", [], "")
        if not self.settings:
            return torch.ops.onednn.qlinear_pointwise(u, scale, zero, packed, *weight, *how)
        u = u.unsqueeze(2) if self.line else u
        u = u.contiguous(memory_format=torch.channels_last)
        y = torch.ops.onednn.qconv2d_pointwise(u, scale, zero, packed, *weight, *self.geometry, self.groups, *how)
        return y.squeeze(2) if self.line else y

    def __getstate__(self) -> dict[str, object]:
        """Leave packed weights out of copies and files: torch can do neither, and they are packed anew."""
        return {**self.__dict__, "_packed": {}}

    def _weight(self, scale: float, zero: int) -> Tensor:
        if (zero != 0) not in self._packed:
            levels = self.levels.unsqueeze(2) if self.line else self.levels
            if self.settings:
                made = torch.ops.onednn.qconv_prepack(
                    levels, self.channel_scale, scale, zero, *self.geometry, self.groups, None
                )
            else:
                made = torch.ops.onednn.qlinear_prepack(levels, None)
            self._packed[zero != 0] = made
        return self._packed[zero != 0]


class IntMM(_Levels):
    """Multiplies by `torch._int_mm`, of signed bytes: linear layers and 1x1 convolutions alone.

    sum((u - z) level) = sum((u - 128) level) + (128 - z) sum(level)
    """

    def __init__(self, layer: nn.Module, weight: IntegerWeight, grid: Grid, row: Row) -> None:
        super().__init__(layer, weight, grid, row)
        matrix = self.levels.flatten(1)
        self.outputs, self.inputs = matrix.shape
        padding = (0, -self.inputs % _MULTIPLE, 0, -self.outputs % _MULTIPLE)
        self.register_buffer("matrix", nn.functional.pad(matrix, padding).t())
        self.register_buffer("sums", matrix.sum(1, dtype=torch.int32))

    def _integers(self, signed: Tensor, scale: float, zero: int) -> Tensor:
        if self.settings:  # [N, C, ...] of a 1x1 convolution
            for axis, stride in enumerate(self.settings["stride"], start=2):
                signed = signed[(slice(None),) * axis + (slice(None, None, stride),)]
            signed = signed.movedim(1, -1)
        rows = signed.reshape(-1, self.inputs)
        n = len(rows)
        rows = nn.functional.pad(rows, (0, -self.inputs % _MULTIPLE, 0, max(0, _ROWS - n)))
        product = torch._int_mm(rows, self.matrix)[:n, : self.outputs] + (BYTE // 2 - zero) * self.sums
        y = (product * (scale * self.scale.flatten())).unflatten(0, signed.shape[:-1])
        return y.movedim(-1, 1) if self.settings else y


def fits_int_mm(layer: nn.Module) -> bool:
    """Whether a layer is a multiplication of matrices: linear, or a 1x1 convolution without groups and padding."""
    if isinstance(layer, nn.Linear):
        return True
    return set(layer.kernel_size) == {1} and set(layer.padding) == {0} and layer.groups == 1


class OneDNNLayer(IntegerLayer):
    """A layer by oneDNN's 8-bit kernels, the first of which adds the bias."""

    multiplication = OneDNN

    def __init__(self, layer: nn.Module, plan: LayerPlan, row: Row) -> None:
        super().__init__(layer, plan, row)
        first = self.parts[0]
        if self.bias is not None and not first.shifted:
            first.bias, self.bias = self.bias.flatten().contiguous(), None


class IntMMLayer(IntegerLayer):
    """A layer by `torch._int_mm`."""

    multiplication = IntMM


def kernel_of(layer: nn.Module) -> str:
    """Name what multiplies in a layer of a network that `torch` executes."""
    if isinstance(layer, OneDNNLayer):
        return "onednn qconv2d" if layer.axis == 1 else "onednn qlinear"
    return "torch._int_mm" if isinstance(layer, IntMMLayer) else "torch"
