"""`Call`: what a network receives in one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class Call(NamedTuple):
    """State, time and conditions of N samples.

    As a tuple it holds positional arguments and, at its end, keyword arguments: `quantize_` and `calibrate_` take it.

    Attributes:
        x: state, float [N, C, H, W].
        t: network time, float [N].
        conditions: {argument name: tensor [N, ...]}, such as the class labels `y`; {} for an unconditional network.
    """

    x: Tensor
    t: Tensor
    conditions: Mapping[str, Tensor]

    def evaluate(self, network: Callable[..., Tensor]) -> Tensor:
        """Return what `network` makes of this call."""
        return network(self.x, self.t, **self.conditions)

    def to(self, device: torch.device | str) -> Call:
        """Return the same call on `device`."""
        return self.mapped(lambda tensor: to_device(tensor, device))

    def expanded(self, n: int) -> Call:
        """Return a call of one sample, repeated `n` times."""
        return self.mapped(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    def parts(self, count: int) -> list[Call]:
        """Return `count` calls of nearly as many samples each, one after the other."""
        cut = {name: value.tensor_split(count) for name, value in self.conditions.items()}
        pairs = zip(self.x.tensor_split(count), self.t.tensor_split(count), strict=True)
        return [Call(x, t, {name: rows[i] for name, rows in cut.items()}) for i, (x, t) in enumerate(pairs)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with every tensor changed."""
        conditions = {name: change(value) for name, value in self.conditions.items()}
        return Call(change(self.x), change(self.t), conditions)


def on_device(values: T, device: torch.device | str) -> T:
    """Return tuples, lists and dictionaries of the same form, their tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda tensor: to_device(tensor, device), values)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`.

    From the CPU to a GPU it goes by way of pinned memory, and nobody waits: what computes with it there comes later in
    the order of the GPU's stream. A plain copy waits until all that was begun is done.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
