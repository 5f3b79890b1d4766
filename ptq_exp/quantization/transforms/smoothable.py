"""Which modules' output channels can be rescaled, because only layers read them: found by one forward, not listed.

Nothing may come between but views: SiLU, which follows the norms of residual blocks, does not commute with a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq_exp.quantization.trace.evaluate import evaluate, tensors_in
from ptq_exp.quantization.trace.provenance import KEEPS, Notes, watching
from ptq_exp.quantization.transforms.layers import is_turned

Makers = nn.LayerNorm | nn.GroupNorm | nn.Linear | nn.Conv1d | nn.Conv2d
Readers = nn.Linear | nn.Conv1d | nn.Conv2d

_SWAPS = {torch.transpose, torch.Tensor.transpose, torch.swapaxes}
_PERMUTES = {torch.permute, torch.Tensor.permute}
_VIEWS = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.flatten, torch.Tensor.flatten}
_READS = {F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d}


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
            affine = isinstance(module, Makers) and module.weight is not None and module.weight.ndim > 0
            if affine and not is_turned(module):
                watch(module, after=lambda y, name=name, m=module: notes.set(y, (name, channel_axis_of(m) % y.ndim)))
        evaluate(model, example_inputs)
    return found.sites()


class _Readings:
    """Who reads what each maker made; notes are (maker, channel axis)."""

    def __init__(self) -> None:
        self.readers: dict[str, set[tuple[str, int] | None]] = {}
        self.leaks: set[str] = set()
        self.expected: Tensor | None = None

    def read(self, name: str, layer: nn.Module, x: Tensor, note: tuple[str, int] | None) -> None:
        """Note that the layer `name` is about to read `x`."""
        plain = getattr(layer, "groups", 1) == 1 and not is_turned(layer)
        fits = note is not None and plain and note[1] == channel_axis_of(layer) % x.ndim
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
        for value in tensors_in((args[own_reading:], kwargs)):
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


def channel_axis_of(module: nn.Module) -> int:
    """Channel axis of what a maker makes and a reader reads: 1 of [N, C, ...], the last of [..., C]."""
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        return -1
    return 1 if isinstance(module, nn.GroupNorm) else 1 - module.weight.ndim


def _axis_after(function: Callable, args: tuple, kwargs: dict, x: Tensor, y: Tensor, axis: int) -> int | None:
    """Where the channels of `x` are in ``y = function(x, ...)``; None if they are no longer an axis of their own."""
    if function in KEEPS:
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
