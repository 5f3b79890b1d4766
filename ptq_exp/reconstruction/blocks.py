"""Blocks of a network, found by the names of its modules: what is reconstructed as one piece, in execution order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import ActivationQuantizer, WeightQuantizer, disabled


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
        """This block of `network`."""
        return network.get_submodule(self.name)

    def modules(self, network: nn.Module) -> list[nn.Module]:
        """The layers of this block of `network`."""
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
        example_inputs: positional arguments of the forward.
        elsewhere: layers that are not to be in any of these blocks, as another one has them.

    Raises:
        QuantizationError: a block is called never, or more than once, in a forward; its inputs could not be told apart.
    """
    layers = [name for name, m in network.named_modules() if isinstance(_weight_quantizer(m), WeightQuantizer)]
    owner = {layer: _outermost(layer, patterns) for layer in layers if layer not in elsewhere}
    order = _call_order(network, set(layers) | set(owner.values()), example_inputs)
    counts = Counter(order)
    for name in dict.fromkeys(owner.values()):
        if counts[name] != 1:
            raise QuantizationError(
                f"{name} is called {counts[name]} times in one evaluation of the network and cannot be reconstructed "
                "as a block: keep it in full precision by quantization.keep_fp, or set reconstruction=none"
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
    """The names of `layers` within the module `block`."""
    return tuple(layer.removeprefix(block).removeprefix(".") for layer in layers)


def _weight_quantizer(module: nn.Module) -> nn.Module | None:
    return getattr(module, "weight_quantizer", None)


def _outermost(layer: str, patterns: Sequence[str]) -> str:
    """The outermost module around `layer` (itself included) that matches; `layer` where none does."""
    parts = layer.split(".")
    around = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    return next((name for name in around if any(fnmatchcase(name, pattern) for pattern in patterns)), layer)


@torch.no_grad()
def _call_order(network: nn.Module, names: set[str], example_inputs: tuple) -> list[str]:
    """The modules called `names` in the order in which a forward enters them, once per call."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in network.named_modules()
        if name in names
    ]
    try:
        with disabled(network):  # what is multiplied is the same, and no row of ranges need be chosen
            network.forward(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order
