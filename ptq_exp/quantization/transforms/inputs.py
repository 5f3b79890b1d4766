"""Rows of what layers multiply on the calibration set: a bounded number, drawn without randomness."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq_exp.quantization.online import read_by
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.quantization.transforms.layers import channel_axis

ROWS = 512
"""Rows that are kept of each layer, at least where it reads as many."""


class Rows:
    """Rows [n, channels] out of all that are shown, evenly spread; between `most` and twice as many, or all."""

    def __init__(self, most: int = ROWS) -> None:
        self.most, self._stride, self._next, self._held = most, 1, 0, 0
        self._parts: list[Tensor] = []

    def show(self, rows: Tensor) -> None:
        """Keep every n-th of `rows` [n, channels], counted from the first that was ever shown."""
        part = rows[self._next :: self._stride].detach().clone()
        self._next += self._stride * len(part) - len(rows)
        self._parts.append(part)
        self._held += len(part)
        while self._held >= 2 * self.most:  # every other one is enough, and from now on
            kept = torch.cat(self._parts)
            self._next += self._stride * (len(kept) % 2)  # the next one would have been odd or even
            kept = kept[::2].clone()
            self._parts, self._held, self._stride = [kept], len(kept), 2 * self._stride

    @property
    def kept(self) -> Tensor:
        """All that are kept, [n, channels]; none for a layer that was never called."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0, 0)


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer or convolution as a matrix [out, in * kernel], float64."""
    return layer.weight.detach().double().flatten(1)


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer without groups multiplies by its `matrix_of`, as rows [n, in * kernel]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if set(layer.kernel_size) == {1} and not any(layer.padding):
        for axis, stride in enumerate(layer.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, stride),)]
        return x.flatten(2).transpose(1, 2).flatten(0, 1)
    sizes = layer.kernel_size, layer.padding, layer.dilation, layer.stride
    if x.ndim == 3:  # `unfold` takes images
        x, sizes = x.unsqueeze(2), tuple((neutral, *size) for neutral, size in zip((1, 0, 1, 1), sizes, strict=True))
    kernel, padding, dilation, stride = sizes
    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Read:
    """What a layer multiplies on the calibration set.

    Attributes:
        rows: some of them, [n, in * kernel], see `unfolded`.
        largest: magnitude of each channel in all of them, [in].
    """

    rows: Tensor
    largest: Tensor


def read_by_layers(
    network: nn.Module, names: Collection[str], run: Callable[[nn.Module], object], *, rows: bool = True
) -> dict[str, Read]:
    """Run the calibration set, and return what each layer multiplies, behind its online parts, by name.

    Args:
        names: of linear layers and convolutions without groups.
        run: see `Fitting.run`.
        rows: whether they are kept; otherwise there are none.
    """
    kept, largest = {name: Rows() for name in names}, {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        x = read_by(layer, x).detach()
        if rows:
            kept[name].show(unfolded(layer, x))
        now = x.abs().movedim(channel_axis(layer), 0).flatten(1).amax(1)
        largest[name] = torch.maximum(largest[name], now) if name in largest else now

    with watching(network) as watch:
        for name in names:
            layer = network.get_submodule(name)
            watch(layer, before=lambda x, name=name, layer=layer: see(name, layer, x))
        run(network)
    return {
        name: Read(kept[name].kept, largest.get(name, torch.zeros(network.get_submodule(name).weight.shape[1])))
        for name in names
    }
