"""Layers that a transform may change, and what they read: shared by transforms that work layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.cost.macs import Trace, trace
from ptq_exp.quantization.obstacles import layer_obstacles
from ptq_exp.quantization.online import ORDINARY, OnlineLayer, Rotation, online_parts
from ptq_exp.quantization.specs import QuantSpec, Rule, first_match
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.quantization.transforms.base import Applied, Cost, Sites

KINDS = (*ORDINARY, *ORDINARY.values())


def changeable(network: nn.Module, example_inputs: tuple) -> dict[str, nn.Module]:
    """Linear layers and convolutions, by name, whose own forward alone reads their weight, and which are called."""
    counted, obstacles = trace(network, example_inputs), layer_obstacles(network)
    return {
        name: layer for name, layer in network.named_modules()
        if type(layer) in KINDS and name not in obstacles and name not in counted.used_outside
        and counted.layer_macs.get(name)
    }


def without(names: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Return those of `names` that none of the globs `skip` matches."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in skip)]


def quantized_by(sites: Sites, rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
    """Return `sites` without layers that keep weight and input in full precision by `rules`, and without empty ones."""
    kept = {site: tuple(name for name in layers if spec_of(rules, name)) for site, layers in sites.items()}
    return {site: layers for site, layers in kept.items() if layers}


def spec_of(rules: Sequence[Rule], name: str) -> QuantSpec | None:
    """Return how the layer `name` is quantized; None where neither weight nor input is."""
    rule = first_match(rules, name)
    spec = None if rule is None else rule.spec
    return None if spec is None or spec.weight is spec.input is None else spec


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the channels that a layer reads, negative."""
    return 1 - layer.weight.ndim


def applied_to(network: nn.Module, example_inputs: tuple, planned: Applied) -> Applied:
    """Transform `network` in place, and return what was done with its cost.

    Args:
        example_inputs: positional arguments of one sample.
        planned: its cost does not matter.
    """
    before = trace(network, example_inputs)
    cost = planned.transform.cost(network, planned.sites, before.layer_macs)
    had, held = _online_cost(network, before)
    planned.apply_(network)
    has, holds = _online_cost(network, trace(network, example_inputs) if next(online_parts(network), None) else before)
    return replace(planned, cost=cost + Cost(has - had, holds - held))


def _online_cost(network: nn.Module, counted: Trace) -> tuple[int, int]:
    """Multiply-accumulates and bytes of all online parts of `network`, by its `trace`."""
    parts = dict(online_parts(network))
    return sum(counted.layer_macs.get(name, 0) for name in parts), sum(part.bytes for part in parts.values())


def is_turned(layer: nn.Module) -> bool:
    """Whether the channels that a layer multiplies are no longer those that it is called with, or split up."""
    turned = isinstance(layer, OnlineLayer) and any(isinstance(part, Rotation) for part in layer.online)
    return turned or (isinstance(layer, OnlineLayer) and layer.branch is not None)


def globs(setting: str, value: object) -> tuple[str, ...]:
    """Return a setting that lists globs as a tuple.

    Raises:
        ConfigError: it lists something else.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{setting}={value}: give a list of globs of layers, such as [conv_in]")
    return tuple(value)


def check_number(setting: str, value: object, least: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{setting}={value}: choose {least} or more")


def check_flag(setting: str, value: object) -> None:
    """Raise ConfigError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{setting}={value}: choose true or false")


def sharing(
    network: nn.Module, layers: Mapping[str, nn.Module], example_inputs: tuple
) -> dict[str, tuple[str, ...]]:
    """{first layer: layers of one module that read the same tensor, as q, k and v do}; convolutions are alone.

    Args:
        layers: of `network`, by name.
    """
    found: dict[tuple, list[str]] = {}
    for name, read in _inputs(network, layers, example_inputs).items():
        alone = not isinstance(layers[name], nn.Linear) or len(read) != 1
        found.setdefault((name,) if alone else (name.rpartition(".")[0], *read), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def _inputs(network: nn.Module, layers: Mapping[str, nn.Module], example_inputs: tuple) -> dict[str, set[tuple]]:
    """{layer: the tensors that it reads}, each by its number and by what is computed on it online, in module order."""
    numbers: dict[int, int] = {}
    held: list[Tensor] = []  # the identity of a tensor that is gone may be given to another
    found: dict[str, set[tuple]] = {name: set() for name in layers}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        held.append(x)
        parts = tuple(part.meaning for part in layer.online) if isinstance(layer, OnlineLayer) else ()
        found[name].add((numbers.setdefault(id(x), len(numbers)), parts))

    with watching(network) as watch:
        for name, layer in layers.items():
            watch(layer, before=lambda x, name=name, layer=layer: see(name, layer, x))
        evaluate(network, example_inputs)
    return found
