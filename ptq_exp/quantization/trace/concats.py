"""Which layers read concatenated features, and which outputs are cut into pieces: found by one forward, not listed.

The up path of a U-Net concatenates its own features with those of the down path, whose distributions differ. A range
for each part keeps the narrower one from being lost (Li et al. 2023, "Q-Diffusion", section 3.3, "shortcut-splitting").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import KEEPS, Notes, watching

Parts = tuple[int, ...]

# Functions of each channel of [N, C, ...] apart (a group's statistics scale them, but never mix them).
_PER_CHANNEL = {
    F.group_norm, torch.group_norm, F.silu, F.relu, F.gelu, F.interpolate, F.avg_pool2d, F.max_pool2d, torch.sigmoid,
}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_CHUNKS = {torch.chunk, torch.Tensor.chunk}


def find_concats(model: nn.Module, example_inputs: tuple, *, through_maps: bool = False) -> dict[str, Parts]:
    """Layers whose input is a concatenation along the channels, with the channel counts of its parts.

    Found are convolutions that read the output of ``torch.cat(..., dim=1)`` of tensors [N, C, ...], directly or, with
    `through_maps`, behind functions of each channel (GroupNorm, SiLU, resizing): the 1x1 shortcuts, and also the first
    3x3 convolutions, of the up path of a U-Net. A layer called with different parts from call to call is left out. A
    transformer has none.

    Args:
        model: the network, in full precision.
        example_inputs: positional arguments of one sample.
    """
    keeps = KEEPS | _PER_CHANNEL if through_maps else KEEPS

    def carry(function, args: tuple, kwargs: dict, output: Tensor, notes: Notes) -> Parts | None:
        if function in _CATS:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if output.ndim < 3 or dim % output.ndim != 1:
                return None
            # a concatenation of concatenations has the parts of both
            return tuple(n for tensor in tensors for n in notes.of(tensor) or (tensor.shape[1],))
        return notes.of(args[0] if args else kwargs.get("input")) if function in keeps else None

    seen: dict[str, set[Parts | None]] = {}
    notes = Notes(carry)
    with watching(model) as watch, notes:
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == 1:
                watch(layer, before=lambda x, name=name: seen.setdefault(name, set()).add(notes.of(x)))
        evaluate(model, example_inputs)
    return {name: parts for name, (parts, *others) in ((n, [*s]) for n, s in seen.items())
            if not others and parts and len(parts) > 1}


def find_chunks(model: nn.Module, example_inputs: tuple) -> dict[str, Parts]:
    """Linear layers of one vector per sample whose output is cut into pieces, with the lengths of the pieces.

    They condition the network: the scale | shift projection of the time embedding in a ResBlock, the six of an
    adaptive layer norm. (The gate of a feed-forward layer is cut too, but holds a vector per token.)
    """
    found: dict[str, Parts] = {}

    def carry(function, args: tuple, kwargs: dict, output: Tensor, notes: Notes) -> str | None:
        source = args[0] if args else kwargs.get("input")
        name = notes.of(source)
        if name is None:
            return None
        if function in _CHUNKS:
            pieces = args[1] if len(args) > 1 else kwargs["chunks"]
            dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            if dim % source.ndim == 1:
                found[name] = tuple(part.shape[1] for part in torch.empty(1, source.shape[1]).chunk(pieces, dim=1))
            return None
        return name if function is torch.Tensor.__getitem__ and output.shape[:2] == source.shape[:2] else None

    notes = Notes(carry)
    with watching(model) as watch, notes:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                watch(layer, after=lambda y, name=name: notes.set(y, name if y.ndim == 2 else None))
        evaluate(model, example_inputs)
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def depending_on_alone(model: nn.Module, example_inputs: tuple, argument: int) -> list[str]:
    """Linear layers and convolutions whose input depends on the argument number `argument` alone.

    For the time argument of a diffusion network: the time-embedding layers, which see as many different inputs as
    there are times (Huang et al. 2024, "TFMQ-DM", section 4). Found by forwards with other values of each argument.
    """
    first = _layer_inputs(model, example_inputs)
    changes: list[set[str]] = []
    values, structure = pytree.tree_flatten(tuple(example_inputs))
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            changes.append(set())
            continue
        changed = [*values]
        changed[position] = _other(value)
        second = _layer_inputs(model, pytree.tree_unflatten(changed, structure))
        changes.append({name for name in first if not torch.equal(first[name], second[name])})
    others = set().union(*(names for position, names in enumerate(changes) if position != argument))
    return [name for name in first if name in changes[argument] - others]


def _layer_inputs(model: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    """Return what each linear layer and convolution reads (at its last call)."""
    found: dict[str, Tensor] = {}
    with watching(model) as watch:
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                watch(layer, before=lambda x, name=name: found.update({name: x.clone()}))
        evaluate(model, inputs)
    return found


def _other(value: Tensor) -> Tensor:
    """Other values: the next label, or each number moved by about 100 (times go to 1000)."""
    if not value.is_floating_point():
        return value + 1
    return value + 100 + torch.arange(value.numel(), device=value.device).sin().reshape(value.shape).to(value.dtype)
