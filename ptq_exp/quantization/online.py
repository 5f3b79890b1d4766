"""What transforms of a network compute at run time: on the input of a layer, or beside it.

An online layer, `OnlineLinear` and its like, is an ordinary one with two children: `online`, modules that its input
passes one after the other, and `branch`, whose output is added to its own (None: nothing). Input quantizers see what
`online` returns; the branch reads the same, unquantized. Layers are turned into online ones in place, as they are into
quantized ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq_exp.quantization.transforms.hadamard import regular_hadamard

SIXTEEN = 16


class Online(nn.Module):
    """Multiplications that a transform adds to a network. All tensors are buffers: the network's parameters stay.

    Attributes:
        bits: widths of the two operands, for bit operations.
        meaning: what it is, for reports.
    """

    bits = (SIXTEEN, SIXTEEN)
    meaning = ""

    def macs(self, read: torch.Size, made: torch.Size) -> int:
        """Return the multiply-accumulates of one call, by the shapes of its input and output."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Size of its stored numbers."""
        return sum(buffer.numel() * buffer.element_size() for _, buffer in self.stored())

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the buffers that are saved."""
        return ((name, x) for name, x in self.named_buffers() if name not in self._non_persistent_buffers_set)


class Rotation(Online):
    """Turns each block of `size` channels by the regular Hadamard matrix of that size, which is its own inverse.

    Args:
        axis: of the channels, negative.
    """

    bits = (1, SIXTEEN)  # the matrix has signs alone; its factor, a power of 2, is one of the whole

    def __init__(self, size: int, axis: int) -> None:
        super().__init__()
        self.size, self.axis = size, axis
        self.meaning = f"online rotation in blocks of {size}"
        self.register_buffer("matrix", regular_hadamard(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, ...] -> the same, turned."""
        return rotated(x, self.matrix.to(x.dtype), self.axis)

    def macs(self, read: torch.Size, made: torch.Size) -> int:
        """As `Online.macs`: `size` for each element."""
        return made.numel() * self.size


class Scaling(Online):
    """Multiplies each channel by a number.

    Args:
        axis: of the channels, negative.
    """

    meaning = "online smoothing"

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("factor", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, ...] -> the same, scaled."""
        return x * self.factor.to(x.dtype).view(-1, *[1] * (-1 - self.axis))

    def macs(self, read: torch.Size, made: torch.Size) -> int:
        """As `Online.macs`: one for each element, though nothing is accumulated."""
        return made.numel()


class Branch(Online):
    """A product of two thin factors beside a linear layer or convolution, stored in 16 bits.

    Args:
        layer: without groups; its stride, padding and dilation are those of the first factor.
        rank: channels between the factors.
        owner: the branch whose first factor this one shares; None = it has its own.
    """

    def __init__(self, layer: nn.Module, rank: int, owner: Branch | None = None) -> None:
        super().__init__()
        weight = layer.weight
        kind = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float16
        self.meaning = f"low-rank branch of rank {rank}"
        self.settings = {} if isinstance(layer, nn.Linear) else {
            "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation
        }
        self.multiply = F.linear if weight.ndim == 2 else F.conv1d if weight.ndim == 3 else F.conv2d
        self._owner = [owner]  # a list: no child, its tensor is stored once
        up = (len(weight), rank, *[1] * (weight.ndim - 2))
        self.register_buffer("up", torch.zeros(up, dtype=kind, device=weight.device))
        down = None if owner else torch.zeros(rank, *weight.shape[1:], dtype=kind, device=weight.device)
        self.register_buffer("down", down)

    @property
    def first(self) -> Tensor:
        """The first factor, [rank, in, *kernel]."""
        return self._owner[0].first if self.down is None else self.down

    @property
    def weight_of_product(self) -> Tensor:
        """The weight [out, in, *kernel] of the product, float64."""
        up, down = self.up.double().flatten(1), self.first.double()
        return (up @ down.flatten(1)).view(len(up), *down.shape[1:])

    @torch.no_grad()
    def fill_(self, up: Tensor, down: Tensor) -> None:
        """Copy the factors, matrices [out, rank] and [rank, in * kernel], in place; the first if it is its own."""
        self.up.copy_(up.view(self.up.shape))
        if self.down is not None:
            self.down.copy_(down.view(self.down.shape))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it belongs to, without bias."""
        inner = self.multiply(x, self.first.to(x.dtype), **self.settings)
        return self.multiply(inner, self.up.to(x.dtype))

    def macs(self, read: torch.Size, made: torch.Size) -> int:
        """As `Online.macs`."""
        channels, positions = self.up.shape[0], made.numel() // self.up.shape[0]
        return positions * self.up.shape[1] * (channels + self.first[0].numel())


class ChangedLayer:
    """What layers have in common whose class is assigned to an ordinary one, by `make_online_` or `retype_`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """Make an ordinary layer where a new one is asked for: adapters of peft are new layers of a layer's type."""
        kind = next(kind for kind in cls.__mro__ if kind in _ONLINE)
        return kind(*args, **kwargs) if args or kwargs else nn.Module.__new__(cls)


class OnlineLayer(ChangedLayer):
    """What all layers with online parts have in common; see `make_online_`."""

    online: nn.Sequential
    branch: Branch | None

    def forward(self, input: Tensor) -> Tensor:
        """As the layer, on the input that `online` returns, with the branch."""
        x = self.online(input)
        y = super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]  of the layer's own class
        return y if self.branch is None else y + self.branch(x)


class OnlineConv1d(OnlineLayer, nn.Conv1d):
    """`nn.Conv1d` with online parts."""


class OnlineConv2d(OnlineLayer, nn.Conv2d):
    """`nn.Conv2d` with online parts."""


class OnlineLinear(OnlineLayer, nn.Linear):
    """`nn.Linear` with online parts."""


ORDINARY: dict[type[nn.Module], type[nn.Module]] = {
    OnlineConv1d: nn.Conv1d, OnlineConv2d: nn.Conv2d, OnlineLinear: nn.Linear
}
_ONLINE = {ordinary: online for online, ordinary in ORDINARY.items()}


def make_online_(layer: nn.Module) -> nn.Module:
    """Turn an ordinary layer into one that can have online parts, in place; return it. One that can stays as it is."""
    if type(layer) in _ONLINE:
        layer.__class__ = _ONLINE[type(layer)]
        layer.online = nn.Sequential()
        layer.register_module("branch", None)
    return layer


def online_parts(model: nn.Module) -> Iterator[tuple[str, Online]]:
    """Yield (name, module) of what transforms added, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Online))


def read_by(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies when it is called with `x`."""
    return layer.online(x) if isinstance(layer, OnlineLayer) else x


def rotated(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply each block of the channels on `axis` (negative) by a symmetric `matrix` of the size of the block."""
    size = len(matrix)
    if axis == -1:
        return F.linear(x.unflatten(-1, (-1, size)), matrix).flatten(-2)
    blocks = x.flatten(axis + 1).unflatten(-2, (-1, size))
    return torch.matmul(matrix, blocks).reshape(x.shape)
