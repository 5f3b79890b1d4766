"""Moving the outliers of activation channels into the weights that read them, without changing the function.

Where a norm with an affine part, or a layer, makes what linear layers and convolutions read, each of its channels can
be divided by a number and the weights that read it multiplied by the same number. With channels of like size one range
for all of them loses less (Xiao et al. 2023, "SmoothQuant", equation 4). Nothing may come between but views: SiLU,
which follows the norms of residual blocks, does not commute with a factor. Found by one forward, not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import Notes, watching
from ptq_exp.quantization.transforms.base import Fitting, Sites, Transform

Makers = nn.LayerNorm | nn.GroupNorm | nn.Linear | nn.Conv1d | nn.Conv2d
Readers = nn.Linear | nn.Conv1d | nn.Conv2d

_SAME = {F.dropout, torch.clone, torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float}
_SWAPS = {torch.transpose, torch.Tensor.transpose, torch.swapaxes}
_PERMUTES = {torch.permute, torch.Tensor.permute}
_VIEWS = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.flatten, torch.Tensor.flatten}
_READS = {F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d}


@dataclass(frozen=True)
class Smooth(Transform):
    """Divide the channels of a norm or layer by max|x|^alpha / max|w|^(1 - alpha), and multiply the weights that read.

    Attributes:
        alpha: 0 to 1, share of the outliers that moves into the weights.

    Raises:
        ConfigError: `alpha` is none.
    """

    name: ClassVar[str] = "smooth"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"quantization.transforms: smooth: alpha={self.alpha}: choose 0..1")

    def find(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
        """Return the modules that can be divided, each with the layers that read it; see `smoothable`."""
        return smoothable(network, example_inputs)

    def fit(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Return the factors [C] of each module."""
        with largest_outputs(network, sites) as largest:
            fitting.run(network)
        return smoothing_factors(network, sites, largest, self.alpha)

    def fold_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Divide and multiply."""
        smooth_(network, sites, tensors)


def smoothable(model: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
    """Modules whose output channels can be rescaled, each with the layers that read it (and nothing else does).

    Args:
        model: in full precision.
        example_inputs: positional arguments of one sample.
    """
    found = _Readings()
    notes = Notes(found.carry)
    with watching(model) as watch, notes:
        for name, module in model.named_modules():
            if isinstance(module, Readers):
                watch(module, before=lambda x, name=name, m=module: found.read(name, m, x, notes.of(x)))
            if isinstance(module, Makers) and module.weight is not None and module.weight.ndim > 0:
                watch(module, after=lambda y, name=name, m=module: notes.set(y, (name, _axis(m) % y.ndim)))
        evaluate(model, example_inputs)
    return found.sites()


@contextmanager
def largest_outputs(model: nn.Module, names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Fill, while `model` runs inside the context, the largest |output| per channel [C] of each module of `names`."""
    largest: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, y: Tensor) -> None:
        now = y.detach().float().abs().movedim(_axis(module), 0).flatten(1).amax(1)
        largest[name] = torch.maximum(largest[name], now) if name in largest else now

    with watching(model) as watch:
        for name in names:
            module = model.get_submodule(name)
            watch(module, after=lambda y, name=name, module=module: see(name, module, y))
        yield largest


def smoothing_factors(
    model: nn.Module, sites: Mapping[str, tuple[str, ...]], largest: Mapping[str, Tensor], alpha: float = 0.5
) -> dict[str, Tensor]:
    """Return for each maker the numbers [C] that its channels are to be divided by: max|x|^alpha / max|w|^(1 - alpha).

    Args:
        sites: see `smoothable`.
        largest: see `largest_outputs`.
        alpha: share of the outliers that moves into the weights: 0, all of the weights' into the activations; 1, the
            opposite. A channel that is zero on either side is left alone.
    """
    factors = {}
    for maker, readers in sites.items():
        weights = [model.get_submodule(reader).weight.detach().float() for reader in readers]
        weight = torch.stack([w.abs().movedim(1, 0).flatten(1).amax(1) for w in weights]).amax(0)
        x = largest[maker].to(weight.device)
        usable = (x > 0) & (weight > 0)
        factors[maker] = torch.where(usable, x**alpha / weight ** (1 - alpha), 1.0)
    return factors


@torch.no_grad()
def smooth_(model: nn.Module, sites: Mapping[str, tuple[str, ...]], factors: Mapping[str, Tensor]) -> None:
    """Divide the channels of each maker by its factors and multiply the weights that read them, in place."""
    for maker, readers in sites.items():
        module, factor = model.get_submodule(maker), factors[maker]
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.div_(factor.to(parameter).reshape(-1, *[1] * (parameter.ndim - 1)))
        for reader in readers:
            weight = model.get_submodule(reader).weight
            weight.mul_(factor.to(weight).reshape(1, -1, *[1] * (weight.ndim - 2)))


class _Readings:
    """Who reads what each maker made; notes are (maker, channel axis)."""

    def __init__(self) -> None:
        self.readers: dict[str, set[tuple[str, int] | None]] = {}
        self.leaks: set[str] = set()
        self.expected: Tensor | None = None

    def read(self, name: str, layer: nn.Module, x: Tensor, note: tuple[str, int] | None) -> None:
        """Note that the layer `name` is about to read `x`."""
        fits = note is not None and note[1] == _axis(layer) % x.ndim and getattr(layer, "groups", 1) == 1
        if note is not None and not fits:
            self.leaks.add(note[0])
        self.readers.setdefault(name, set()).add(note if fits else None)
        self.expected = x

    def carry(self, function: Callable, args: tuple, kwargs: dict, output: Tensor, notes: Notes):
        """Return the note of `output`; a use of a noted tensor that is neither view nor a layer's reading is a leak."""
        first = args[0] if args else kwargs.get("input")
        note = notes.of(first)
        if note is not None and (axis := _axis_after(function, args, kwargs, first, output, note[1])) is not None:
            return note[0], axis
        own_reading = function in _READS and first is self.expected
        for value in _tensors((args[own_reading:], kwargs)):
            if (leaked := notes.of(value)) is not None:
                self.leaks.add(leaked[0])
        return None

    def sites(self) -> dict[str, tuple[str, ...]]:
        """Makers that have readers, all of which read nothing else, and no other use."""
        found: dict[str, list[str]] = {}
        for reader, notes in self.readers.items():
            makers = {note[0] for note in notes if note is not None}
            if len(makers) == 1 and None not in notes:
                found.setdefault(makers.pop(), []).append(reader)
            else:
                self.leaks |= makers
        return {maker: tuple(readers) for maker, readers in found.items() if maker not in self.leaks}


def _axis(module: nn.Module) -> int:
    """Channel axis of what a maker makes and a reader reads: 1 of [N, C, ...], the last of [..., C]."""
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        return -1
    return 1 if isinstance(module, nn.GroupNorm) else 1 - module.weight.ndim


def _axis_after(function: Callable, args: tuple, kwargs: dict, x: Tensor, y: Tensor, axis: int) -> int | None:
    """Where the channels of `x` are in ``y = function(x, ...)``; None if they are no longer an axis of their own."""
    if function in _SAME:
        return axis
    if function in _SWAPS or function in _PERMUTES:
        # ask a tensor whose size at each axis is the number of that axis (zero strides: it takes no memory)
        marked = function(torch.empty(1).as_strided([i + 1 for i in range(x.ndim)], [0] * x.ndim), *args[1:], **kwargs)
        return list(marked.shape).index(axis + 1)
    if function in _VIEWS:
        after, size = prod(x.shape[axis + 1 :]), x.shape[axis]
        for candidate in range(y.ndim):
            if y.shape[candidate] == size and prod(y.shape[candidate + 1 :]) == after:
                return candidate
    return None


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
