"""The blocks of a network in the order in which it calls them, who reads their answers, and what lies outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.quantization.calibrate import disabled
from ptq_exp.quantization.trace.evaluate import evaluate, tensors_in
from ptq_exp.quantization.trace.provenance import Notes


def outermost(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the outermost modules that match one of `patterns` and have parameters, in module order.

    Args:
        patterns: case-sensitive globs on module names.
    """
    found: list[str] = []
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        matches = any(fnmatchcase(name, pattern) for pattern in patterns)
        if name and matches and not inside and next(module.parameters(), None) is not None:
            found.append(name)
    return found


def blocks_in_order(network: nn.Module, patterns: Sequence[str], example_inputs: Sequence) -> list[str]:
    """Return the modules of `outermost` in the order of their calls; those that one forward calls once.

    Args:
        example_inputs: arguments of a call.
    """
    calls = called_in_order(network, outermost(network, patterns), example_inputs)
    return [name for name in calls if calls.count(name) == 1]


@torch.no_grad()
def called_in_order(network: nn.Module, names: Collection[str], example_inputs: Sequence) -> list[str]:
    """Return those of the modules `names` that one forward calls, in that order, once per call."""
    order: list[str] = []
    with disabled(network), ExitStack() as hooks:  # what is called is the same, and it need not be calibrated
        for name in names:
            module = network.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
        evaluate(network.forward, example_inputs)
    return order


def without(network: nn.Module, names: Collection[str]) -> nn.Module:
    """Return `network` without the modules `names`, for what goes through its modules: they are shared, not copied."""
    inside = {}
    for key, child in network._modules.items():
        below = [name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")]
        if key not in names and child is not None:
            inside[key] = without(child, below) if below else child
    if all(inside.get(key) is child for key, child in network._modules.items()):
        return network
    shell = copy.copy(network)
    shell._modules = inside
    return shell


@torch.no_grad()
def last_readers(network: nn.Module, names: Sequence[str], example_inputs: Sequence) -> dict[str, str | None]:
    """Return for each block the last one that reads what it answered, itself or what was computed of it in between.

    None = the network reads it behind its last block, or a layer outside of blocks does.

    Args:
        names: of the blocks, see `blocks_in_order`.
    """
    readers: dict[str, str | None] = {name: name for name in names}
    notes, inside = Notes(_all_notes), []

    def enter(name: str | None, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if not inside:
            for block in _noted(notes, (args, kwargs)):
                readers[block] = name if readers[block] is not None else None
        if name is not None:
            inside.append(name)

    def leave(name: str, _: nn.Module, args: tuple, output: Any) -> None:
        inside.remove(name)
        for tensor in tensors_in(output):
            notes.set(tensor, frozenset([name]))

    outside = [m for m in without(network, names).modules() if next(m.children(), None) is None]
    with ExitStack() as hooks, disabled(network):
        for module in outside:
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, None), with_kwargs=True))
        for name in names:
            block = network.get_submodule(name)
            hooks.enter_context(block.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(partial(leave, name)))
        with notes:
            answer = evaluate(network.forward, example_inputs)
    return readers | dict.fromkeys(_noted(notes, answer))


def _all_notes(function: Callable, args: tuple, kwargs: dict, output: Tensor, notes: Notes) -> frozenset | None:
    return _noted(notes, (args, kwargs)) or None


def _noted(notes: Notes, values: Any) -> frozenset[str]:
    found = [notes.of(tensor) for tensor in tensors_in(values)]
    return frozenset().union(*(note for note in found if note is not None))
