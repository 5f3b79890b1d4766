"""Hessians of layers: sum x x^T over everything that a layer multiplies its weight with, as it multiplies it.

A convolution multiplies patches of its (quantized, then padded) input, of each group of channels apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 1 << 24
"""Elements of unfolded inputs at a time: 64 MB in float32."""


def hessian_bytes(layer: nn.Module) -> int:
    """Return the size of the Hessians of a convolution or linear layer, float64 [groups, columns, columns]."""
    return 8 * _groups(layer) * layer.weight[0].numel() ** 2


def grouped(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight`, in the shape of the layer's, as float64 [groups, out, columns]."""
    return weight.detach().double().reshape(_groups(layer), -1, weight[0].numel())


class InputHessian:
    """The Hessian of the inputs of one layer, added up batch by batch.

    Products of a chunk are taken in float32, and summed in float64.

    Attributes:
        total: float64 [groups, columns, columns], columns in the order of the flattened weight.
        rows: inputs (tokens, or positions of patches) so far.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.rows = layer, 0
        columns = layer.weight[0].numel()
        self.total = torch.zeros(
            _groups(layer), columns, columns, dtype=torch.float64, device=layer.weight.device
        )

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs `x`, quantized, as the layer's forward has them before it pads."""
        if isinstance(self.layer, nn.Linear):
            parts = x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1]))
            self._add(part[None] for part in parts)
            return
        x = x.reshape(-1, *x.shape[x.ndim - self.layer.weight.ndim + 1 :])  # unbatched, too
        columns = self.layer.weight[0].numel() * _groups(self.layer)
        per_sample = max(1, x[0].numel() // x.shape[1]) * columns
        self._add(self._patches(part) for part in x.split(max(1, CHUNK // per_sample)))

    def _add(self, parts) -> None:
        for part in parts:  # [groups, rows, columns]
            part = part.float()
            self.total += (part.mT @ part).double()
            self.rows += part.shape[1]

    def _patches(self, x: Tensor) -> Tensor:
        """Unfold ``x`` [N, C, *size] of a convolution to [groups, N positions, columns]."""
        layer = self.layer
        kind = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, kind)
        flat = isinstance(layer, nn.Conv1d)
        kernel, stride, dilation = (
            (1, *value) if flat else value for value in (layer.kernel_size, layer.stride, layer.dilation)
        )
        patches = functional.unfold(x[:, :, None] if flat else x, kernel, dilation=dilation, stride=stride)
        n, _, positions = patches.shape
        return patches.view(n, layer.groups, -1, positions).permute(1, 0, 3, 2).reshape(
            layer.groups, n * positions, -1
        )


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)
