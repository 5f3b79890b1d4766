"""Moving the outliers of activation channels into the weights that read them, without changing the function.

Where a norm with an affine part, or a layer, makes what linear layers and convolutions read, each of its channels can
be divided by a number and the weights that read it multiplied by the same number. With channels of like size one range
for all of them loses less (Xiao et al. 2023, "SmoothQuant", equation 4). Elsewhere the input of a layer can be
multiplied at run time. The numbers follow from a strength, or are searched: see `smooth_search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.online import Scaling, make_online_
from ptq_exp.quantization.specs import Rule
from ptq_exp.quantization.trace.concats import find_concats
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.quantization.transforms.base import Fitting, Sites, Transform
from ptq_exp.quantization.transforms.inputs import read_by_layers
from ptq_exp.quantization.transforms.layers import (
    changeable,
    channel_axis,
    check_flag,
    check_number,
    is_turned,
    quantized_by,
    sharing,
    spec_of,
)
from ptq_exp.quantization.transforms.powers import powers_of_two
from ptq_exp.quantization.transforms.smooth_search import searched_factors
from ptq_exp.quantization.transforms.smoothable import channel_axis_of, smoothable

SEARCH = "search"
ONLINE, CONCAT = "online ", "concat "
"""Beginnings of the names of sites whose layers multiply their input at run time: a group of readers; a reader of
concatenated features. Other sites are the modules that are divided."""
_SETTING = "quantization.transforms: smooth"


@dataclass(frozen=True)
class Smooth(Transform):
    """Divide the channels of a norm or layer by max|x|^alpha / max|w|^(1 - alpha), and multiply the weights that read.

    Attributes:
        alpha: 0 to 1, share of the outliers that moves into the weights; "search": the best of 39 pairs of exponents,
            by the output error of the layers that read, quantized by the rules.
        online: smooth the input of all other layers, too, by a multiplication at run time.
        power_of_two: multiply channels of concatenated features by 1, 2, 4 or 8 at run time, where their quantizer is
            so much too coarse for them in 85 of 100 samples (DMQ).
        rank: of a low-rank branch that takes part in the search; 0 = none.

    Raises:
        ConfigError: a value is impossible.
    """

    name: ClassVar[str] = "smooth"
    alpha: float | str = 0.5
    online: bool = False
    power_of_two: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (self.alpha == SEARCH or (number and 0 <= self.alpha <= 1)):
            raise ConfigError(f"{_SETTING}: alpha={self.alpha}: choose 0..1, or {SEARCH}")
        for setting in ("online", "power_of_two"):
            check_flag(f"{_SETTING}: {setting}", getattr(self, setting))
        check_number(f"{_SETTING}: rank", self.rank, 0)
        if self.rank and self.alpha != SEARCH:
            raise ConfigError(f"{_SETTING}: rank={self.rank}: it is part of the search: set alpha={SEARCH}, or rank=0")

    @property
    def uses_rules(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  by its settings
        """Whether `fit` looks at the rules."""
        return self.alpha == SEARCH or self.power_of_two

    def to_dict(self) -> dict[str, Any]:
        """As `Transform.to_dict`; of the settings behind `alpha` those that are not the default."""
        defaults = {"online": False, "power_of_two": False, "rank": 0}
        return {key: value for key, value in super().to_dict().items() if defaults.get(key, ...) != value}

    def find(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
        """Return what can be divided, each with the layers that read it (see `smoothable`), then the online sites."""
        found = smoothable(network, example_inputs)
        if not (self.online or self.power_of_two):
            return found
        taken = {reader for readers in found.values() for reader in readers}
        layers = {
            name: layer for name, layer in changeable(network, example_inputs).items()
            if name not in taken and not is_turned(layer) and getattr(layer, "groups", 1) == 1
        }
        concats = find_concats(network, example_inputs, through_maps=True) if self.power_of_two else {}
        found |= {CONCAT + name: (name,) for name in layers if name in concats}
        if self.online:
            others = {name: layer for name, layer in layers.items() if name not in concats}
            found |= {ONLINE + first: names for first, names in sharing(network, others, example_inputs).items()}
        return found

    def chosen(self, sites: Sites, rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
        """Leave out layers that stay in full precision, where something would be computed for them at run time."""
        online = quantized_by({site: layers for site, layers in sites.items() if _is_online(site)}, rules)
        return {site: online.get(site, sites[site]) for site in sites if site in online or not _is_online(site)}

    def fit(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Return the factors [C] of each site, by which its channels are divided."""
        concats = {site: names for site, names in sites.items() if site.startswith(CONCAT)}
        others = {site: names for site, names in sites.items() if site not in concats}
        tensors = powers_of_two(network, concats, fitting)
        if self.alpha == SEARCH:
            return tensors | self._searched(network, others, fitting)
        folded = {site: names for site, names in others.items() if not _is_online(site)}
        online = {site: names for site, names in others.items() if _is_online(site)}
        with largest_outputs(network, folded) as largest:
            read = read_by_layers(network, [names[0] for names in online.values()], fitting.run, rows=False)
        largest = largest | {site: read[names[0]].largest for site, names in online.items()}
        return tensors | smoothing_factors(network, others, largest, self.alpha)

    def install_(self, network: nn.Module, sites: Sites) -> None:
        """Let layers of the online sites multiply their input, by 1."""
        for name in (name for site, layers in sites.items() if _is_online(site) for name in layers):
            layer = make_online_(network.get_submodule(name))
            layer.online.append(Scaling(layer.weight.shape[1], channel_axis(layer)).to(layer.weight.device))

    @torch.no_grad()
    def fold_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Divide and multiply."""
        smooth_(network, {site: layers for site, layers in sites.items() if not _is_online(site)}, tensors)
        for site in (site for site in sites if _is_online(site)):
            for name in sites[site]:
                layer = network.get_submodule(name)
                scaling = next(part for part in layer.online if isinstance(part, Scaling))
                scaling.factor.copy_(1 / tensors[site].double())
                shape = (1, -1, *[1] * (layer.weight.ndim - 2))
                layer.weight.copy_(layer.weight.double() / scaling.factor.double().view(shape))

    def _searched(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Factors by search; 1 where no reader is quantized."""
        if not sites:
            return {}
        read, found = read_by_layers(network, [names[0] for names in sites.values()], fitting.run), {}
        for site, names in sites.items():
            specs = {name: spec for name in names if (spec := spec_of(fitting.rules, name))}
            layers = [network.get_submodule(name) for name in names]
            quantized = [network.get_submodule(name) for name in specs]
            found[site] = searched_factors(layers, quantized, list(specs.values()), read[names[0]], self.rank)
        return found


def _is_online(site: str) -> bool:
    return site.startswith((ONLINE, CONCAT))


@contextmanager
def largest_outputs(model: nn.Module, names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Fill, while `model` runs inside the context, the largest |output| per channel [C] of each module of `names`."""
    largest: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, y: Tensor) -> None:
        now = y.detach().float().abs().movedim(channel_axis_of(module), 0).flatten(1).amax(1)
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
