"""Blocks of a network, found by the names of its modules: what is reconstructed as one piece, in execution order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import ActivationQuantizer, disabled
from ptq_exp.quantization.calibrate import has_quantized_weight
from ptq_exp.quantization.trace.evaluate import evaluate


@dataclass(frozen=True)
class Block:
    """A module that is reconstructed as one piece.

    Attributes:
        name: of the module in its network.
        layers: names, within the block, of the layers in it whose weights are quantized, in the order of their calls;
            ("",) if the block is itself such a layer.
        elsewhere: names, within the block, of layers in it that belong to another block.
    """

    name: str
    layers: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    def module(self, network: nn.Module) -> nn.Module:
        """Return this block of `network`."""
        return network.get_submodule(self.name)

    def modules(self, network: nn.Module) -> list[nn.Module]:
        """Return the layers of this block of `network`."""
        return [self.module(network).get_submodule(layer) for layer in self.layers]

    @property
    def inner(self) -> tuple[str, ...]:
        """Those of `layers` whose outputs are not outputs of the block."""
        return self.layers[:-1]

    def quantizers(self, network: nn.Module) -> dict[str, ActivationQuantizer]:
        """{name within the block: quantizer} of the activations of this block of `network`."""
        others = tuple(f"{layer}." for layer in self.elsewhere)
        named = self.module(network).named_modules()
        return {name: m for name, m in named if isinstance(m, ActivationQuantizer) and not name.startswith(others)}


def find_blocks(
    network: nn.Module, patterns: Sequence[str], example_inputs: tuple, elsewhere: Collection[str] = ()
) -> list[Block]:
    """All quantized layers of `network` as blocks, in execution order (one forward finds it).

    Args:
        network: quantized and calibrated.
        patterns: case-sensitive globs on module names; the outermost module that matches one is a block. A quantized
            layer outside of all of these is a block of its own. () = every layer is.
        example_inputs: arguments of the forward, see `quantize_`.
        elsewhere: layers that are not to be in any of these blocks, as another one has them.

    Raises:
        QuantizationError: a block is called never in a forward, or on several inputs, which could not be kept apart.
    """
    layers = [name for name, module in network.named_modules() if has_quantized_weight(module)]
    owner = {layer: _outermost(layer, patterns) for layer in layers if layer not in elsewhere}
    names = set(layers) | set(owner.values())
    order, counts = _call_order(network, names, pytree.tree_map(_generic, example_inputs))
    for name in dict.fromkeys(owner.values()):
        if counts[name] != 1:
            inputs = "" if counts[name] == 0 else " on different inputs"
            raise QuantizationError(
                f"{name} is called {counts[name]} times{inputs} in one evaluation of the network and cannot be "
                "reconstructed as a block: keep it in full precision by quantization.keep_fp, or set "
                "reconstruction=none"
            )
    inside: dict[str, list[str]] = {name: [] for name in dict.fromkeys(order) if name in set(owner.values())}
    for layer in dict.fromkeys(order):
        if layer in owner:
            inside[owner[layer]].append(layer)
    return [
        Block(name, _within(name, found), _within(name, [layer for layer in elsewhere if layer.startswith(f"{name}.")]))
        for name, found in inside.items()
    ]


def _within(block: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of `layers` within the module `block`."""
    return tuple(layer.removeprefix(block).removeprefix(".") for layer in layers)


def _outermost(layer: str, patterns: Sequence[str]) -> str:
    """Return the outermost module around `layer` (itself included) that matches; `layer` where none does."""
    parts = layer.split(".")
    around = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    return next((name for name in around if any(fnmatchcase(name, pattern) for pattern in patterns)), layer)


def _generic(value: Any) -> Any:
    """Return a state or time with another number in each place: what differs in general differs here."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value + (1 + torch.arange(value.numel(), device=value.device)).sin().reshape(value.shape).to(value.dtype)


@torch.no_grad()
def _call_order(network: nn.Module, names: set[str], inputs: tuple) -> tuple[list[str], Counter[str]]:
    """Return the modules called `names` in the order in which a forward enters them, once per call.

    And on how many different inputs each is called.
    """
    order: list[str] = []
    seen: dict[str, list[list[Any]]] = {}

    def enter(name: str, args: tuple, kwargs: dict) -> None:
        order.append(name)
        found = pytree.tree_map_only(Tensor, Tensor.clone, pytree.tree_leaves((args, kwargs)))
        if not any(_same(found, other) for other in seen.setdefault(name, [])):
            seen[name].append(found)

    with disabled(network), ExitStack() as hooks:  # what is multiplied is the same, and no row of ranges need be chosen
        for name, module in network.named_modules():
            if name in names:
                hooks.enter_context(module.register_forward_pre_hook(
                    lambda _, *given, name=name: enter(name, *given), with_kwargs=True
                ))
        evaluate(network.forward, inputs)
    return order, Counter({name: len(inputs) for name, inputs in seen.items()})


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether the arguments of two calls are the same."""
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(_same_value(a, b) for a, b in pairs)


def _same_value(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def held_twice(module: nn.Module, tensors: Iterable[Tensor]) -> bool:
    """Whether one of `tensors`, parameters and buffers of `module`, has more than one name there."""
    chosen = {id(tensor) for tensor in tensors}
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return sum(id(tensor) in chosen for _, tensor in held) > len(chosen)
