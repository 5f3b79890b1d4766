"""Weights and tables that are not executed as integers, stored in 16 bits.

A row is scale * level with signed 16-bit levels, each as two bytes: engines keep bytes in their files and in memory,
where they turn float16 and int16 into 32 bits. The largest error is 1 / 65534 of the largest value of a row, which is
less than that of float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 2**15 - 1
SMALLEST_WEIGHT = 2**12
"""Weights with fewer values stay in float32: they add nothing to a file."""


class SixteenBits(nn.Module):
    """A float tensor [rows, ...] in 16 bits, with a scale for each row."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        shape = (-1,) + (1,) * (values.ndim - 1)
        scale = (values.flatten(1).abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        levels = (values / scale.view(shape)).round().int()
        self.register_buffer("high", (levels >> 8).to(torch.int8))
        self.register_buffer("low", (levels & 255).to(torch.uint8))
        self.register_buffer("scale", scale.view(shape))

    def forward(self) -> Tensor:
        """Return all values, float32."""
        return (self.high.float() * 256 + self.low.float()) * self.scale

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows of a table [rows, features] that `index` names, float32 [*index.shape, features]."""
        high, low, scale = (nn.functional.embedding(index, part) for part in (self.high, self.low, self.scale))
        return (high.float() * 256 + low.float()) * scale


class Table(nn.Module):
    """An `nn.Embedding` whose table is stored in 16 bits."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        _keep_settings(self, embedding)
        self.table = SixteenBits(embedding.weight.detach().float())

    @property
    def weight(self) -> Tensor:
        """The whole table, float32."""
        return self.table()

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows of the table, float32 [*index.shape, features]."""
        return self.table.rows(index)


class StoredLayer(nn.Module):
    """A convolution or linear layer in floating point whose weight is stored in 16 bits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        _keep_settings(self, layer)
        self.stored = SixteenBits(layer.weight.detach().float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.function, self.settings = multiplication_of(layer)

    @property
    def weight(self) -> Tensor:
        """The weight, float32."""
        return self.stored()

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands for."""
        return self.function(x, self.stored(), self.bias, **self.settings)


def _keep_settings(made: nn.Module, layer: nn.Module) -> None:
    """Give a module the settings of the layer that it stands for, such as num_embeddings: networks read them."""
    for name in layer.__constants__:
        setattr(made, name, getattr(layer, name))


def multiplication_of(layer: nn.Module):
    """Return the function of torch that a convolution or linear layer calls, and its settings."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear, {}
    function = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
    return function, {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation,
                      "groups": layer.groups}


def stored(layer: nn.Module) -> nn.Module:
    """Store the weight of a layer in 16 bits, where that saves anything; others stay as they are."""
    if type(layer) is nn.Embedding and layer.max_norm is None:
        return Table(layer)
    plain = type(layer) is nn.Linear or (type(layer) in (nn.Conv1d, nn.Conv2d) and layer.padding_mode == "zeros")
    return StoredLayer(layer) if plain and layer.weight.numel() >= SMALLEST_WEIGHT else layer


def store_(network: nn.Module) -> None:
    """Replace every layer and table of `network` that `stored` changes."""
    for name, module in list(network.named_modules()):
        if name and (made := stored(module)) is not module:
            network.set_submodule(name, made)
