"""Turning the channels that layers read, block by block, so that no channel stands out.

y = W x = (W R) (R x) with R of regular Hadamard blocks, R R = 1 ("ConvRot"). A large channel is spread over its block,
which leaves a narrower range to quantize. Weights are turned once, inputs at run time, before their quantizer. Turning
channels commutes with any kernel and with padding, so that convolutions take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.online import Rotation, make_online_, rotated
from ptq_exp.quantization.specs import Rule
from ptq_exp.quantization.trace.concats import find_concats
from ptq_exp.quantization.transforms.base import Fitting, Sites, Transform
from ptq_exp.quantization.transforms.hadamard import BASE, block_size, is_power_of_four, regular_hadamard
from ptq_exp.quantization.transforms.layers import (
    changeable,
    channel_axis,
    check_flag,
    globs,
    is_turned,
    quantized_by,
    without,
)
from ptq_exp.quantization.transforms.value_path import ValuePath, turn_, value_paths

_SETTING = "quantization.transforms: rotate"


@dataclass(frozen=True)
class Rotate(Transform):
    """Turn the input channels of linear layers and convolutions by regular Hadamard blocks, online.

    The block of a layer is the largest 4^k, at most `group` and at least 4, that divides its input channels, and each
    part of them where it reads a concatenation: a part keeps its own range. Sites are "block size" -> layers.

    Attributes:
        group: largest size of a block, a power of 4.
        skip: globs of layers that stay as they are.

    Raises:
        ConfigError: a value is impossible.
    """

    name: ClassVar[str] = "rotate"
    uses_data: ClassVar[bool] = False
    group: int = 256
    skip: tuple[str, ...] = ()
    fold: bool = False

    def __post_init__(self) -> None:
        check_flag(f"{_SETTING}: fold", self.fold)
        if type(self.group) is not int or self.group < BASE or not is_power_of_four(self.group):
            raise ConfigError(f"{_SETTING}: group={self.group}: choose a power of 4: 4, 16, 64, 256, ...")
        object.__setattr__(self, "skip", globs(f"{_SETTING}: skip", self.skip))  # the dataclass is frozen

    def find(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
        """Return {size of the blocks: layers}, the largest first."""
        all_sizes, folded = self._sizes(network, example_inputs), self._folded(network, example_inputs)
        read = {reader for path, _ in folded.values() for reader in path.readers}
        sizes = {name: size for name, size in all_sizes.items() if size >= BASE and name not in read}
        online = {str(size): tuple(n for n in sizes if sizes[n] == size) for size in sorted({*sizes.values()})[::-1]}
        return online | {f"{size} {module}": path.layers for module, (path, size) in folded.items()}

    def chosen(self, sites: Sites, rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
        """Leave out layers that stay in full precision; what is folded stays whole."""
        kept = quantized_by(sites, rules)
        return {site: sites[site] if " " in site else names for site, names in kept.items()}

    def left(self, network: nn.Module, example_inputs: tuple) -> dict[str, str]:
        """Name the layers whose channels no block divides."""
        found = {name: size for name, size in self._sizes(network, example_inputs).items() if size < BASE}
        concats = find_concats(network, example_inputs, through_maps=True)
        return {
            name: f"not rotated: no block of {BASE} or more divides its "
            + (f"parts of {', '.join(map(str, concats[name]))} channels" if name in concats
               else f"{network.get_submodule(name).weight.shape[1]} input channels")
            for name in found
        }

    def fit(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Nothing is fitted."""
        return {}

    def install_(self, network: nn.Module, sites: Sites) -> None:
        """Let the inputs of the layers be turned."""
        for size, layers in sites.items():
            for name in layers if " " not in size else ():
                layer = make_online_(network.get_submodule(name))
                rotation = Rotation(int(size), channel_axis(layer))
                layer.online.append(rotation.to(layer.weight.device, layer.weight.dtype))

    @torch.no_grad()
    def fold_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Turn the weights, in double precision."""
        for site, names in sites.items():
            layers = {name: network.get_submodule(name) for name in names}
            matrix = regular_hadamard(int(site.partition(" ")[0]))
            if " " in site:
                turn_(layers, matrix)
                continue
            for layer in layers.values():
                weight = layer.weight
                matrix = matrix.to(weight.device)
                weight.copy_(rotated(weight.double().movedim(1, -1), matrix, -1).movedim(-1, 1))

    def _folded(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[ValuePath, int]]:
        """{attention module: its path, size of the blocks} where something can be folded."""
        if not self.fold:
            return {}
        allowed = without(list(changeable(network, example_inputs)), self.skip)
        paths = value_paths(network, allowed)
        sizes = {name: block_size(path.width, self.group) for name, path in paths.items()}
        return {name: (paths[name], size) for name, size in sizes.items() if size >= BASE}

    def _sizes(self, network: nn.Module, example_inputs: tuple) -> dict[str, int]:
        """{layer: size of its blocks}, 1 where there are none."""
        layers = changeable(network, example_inputs)
        parts = find_concats(network, example_inputs, through_maps=True)
        names = [n for n in without(list(layers), self.skip) if getattr(layers[n], "groups", 1) == 1]
        names = [name for name in names if not is_turned(layers[name])]
        return {n: block_size(layers[n].weight.shape[1], self.group, parts.get(n, ())) for n in names}
