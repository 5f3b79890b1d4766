"""A branch of low rank in 16 bits beside layers, which takes what is hardest to round out of their weights.

y = x L^T + Q(x) Q(W - L)^T + b with L = up down of a small rank (Li et al. 2024, "SVDQuant"): see `low_rank_split`. The
branch reads what the layer reads, smoothed and rotated where it is, but not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq_exp.quantization.online import Branch, OnlineLayer, make_online_
from ptq_exp.quantization.specs import QuantSpec, Rule
from ptq_exp.quantization.transforms.base import Fitting, Sites, Transform
from ptq_exp.quantization.transforms.inputs import matrix_of, read_by_layers
from ptq_exp.quantization.transforms.layers import (
    changeable,
    check_flag,
    check_number,
    globs,
    quantized_by,
    sharing,
    spec_of,
    without,
)
from ptq_exp.quantization.transforms.low_rank_split import LowRank, low_rank_split
from ptq_exp.quantization.transforms.rounding import input_rounding, weight_rounding

_SETTING = "quantization.transforms: low_rank"


@dataclass(frozen=True)
class LowRankBranch(Transform):
    """Give linear layers and 1x1 convolutions a branch of low rank, and leave the rest of their weight to quantizers.

    Each split is judged by the squared error of the output on calibration inputs, with weight and input quantized by
    the rules. Linear layers of one module that read the same tensor, as q, k and v do, share the first factor: they are
    split as one weight. Sites are the first of such layers -> all of them.

    Attributes:
        rank: of the branch.
        iterations: of the split, at most.
        patience: iterations without a better one after which to stop.
        conv3x3: give larger convolutions a branch, too: as their weight [out, in * kernel] is split, its first factor
            is a convolution with the kernel of the layer.
        skip: globs of layers that stay as they are.

    Raises:
        ConfigError: a value is impossible.
    """

    name: ClassVar[str] = "low_rank"
    uses_rules: ClassVar[bool] = True
    rank: int = 32
    iterations: int = 20
    patience: int = 5
    conv3x3: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for setting in ("rank", "iterations", "patience"):
            check_number(f"{_SETTING}: {setting}", getattr(self, setting), 1)
        check_flag(f"{_SETTING}: conv3x3", self.conv3x3)
        object.__setattr__(self, "skip", globs(f"{_SETTING}: skip", self.skip))  # the dataclass is frozen

    def find(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
        """Return {first layer: layers that share a factor} where a branch is smaller than the weights."""
        return {
            site: layers for site, layers in self._candidates(network, example_inputs).items()
            if self._is_small([network.get_submodule(name) for name in layers])
        }

    def chosen(self, sites: Sites, rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
        """Leave out layers whose weight stays in full precision."""
        kept = quantized_by(sites, rules)
        kept = {site: tuple(n for n in names if spec_of(rules, n).weight) for site, names in kept.items()}
        return {site: names for site, names in kept.items() if names}

    def left(self, network: nn.Module, example_inputs: tuple) -> dict[str, str]:
        """Name the layers that a branch would not be smaller than."""
        found = {}
        for names in self._candidates(network, example_inputs).values():
            layers = [network.get_submodule(name) for name in names]
            if not self._is_small(layers):
                out, read = sum(len(layer.weight) for layer in layers), matrix_of(layers[0]).shape[1]
                reason = f"no branch: with rank {self.rank} it would be as large as the weight of {out} x {read}"
                found |= dict.fromkeys(names, reason)
        return found

    def fit(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Return "SITE.down" [rank, in] of each site, and "LAYER.up" [out, rank] of each layer, float32."""
        read = read_by_layers(network, [layers[0] for layers in sites.values()], fitting.run)
        tensors = {}
        for site, names in sites.items():
            layers = [network.get_submodule(name) for name in names]
            specs = [spec_of(fitting.rules, name) or QuantSpec() for name in names]
            up, down, _ = self.split(layers, specs, read[names[0]].rows)
            tensors[f"{site}.down"] = down.float()
            sizes = [len(layer.weight) for layer in layers]
            tensors |= {f"{name}.up": part.float() for name, part in zip(names, up.split(sizes), strict=True)}
        return tensors

    def split(self, layers: Sequence[nn.Module], specs: Sequence[QuantSpec], rows: Tensor) -> LowRank:
        """Split the weights of layers that read the same `rows` [n, in * kernel], one below the other."""
        rows, sizes = rows.double(), [len(layer.weight) for layer in layers]
        weight = torch.cat([matrix_of(layer) for layer in layers])
        of_weights = [weight_rounding(*pair) for pair in zip(layers, specs, strict=True)]
        read = [input_rounding(*pair, rows)(rows) for pair in zip(layers, specs, strict=True)]

        def quantize(residual: Tensor) -> Tensor:
            parts = zip(of_weights, residual.split(sizes), strict=True)
            return torch.cat([rounded(part) for rounded, part in parts])

        def error(branch: Tensor, residual: Tensor) -> float:
            wanted = (rows @ (weight - branch).T).split(sizes, 1)
            found = (x @ part.T for x, part in zip(read, residual.split(sizes), strict=True))
            return sum(float((y - z).square().sum()) for y, z in zip(wanted, found, strict=True))

        return low_rank_split(
            weight, self.rank, quantize, self.iterations, error=error if len(rows) else None, patience=self.patience
        )

    def install_(self, network: nn.Module, sites: Sites) -> None:
        """Give the layers branches of zeros."""
        for names in sites.values():
            owner = None
            for name in names:
                layer = make_online_(network.get_submodule(name))
                layer.branch = Branch(layer, self.rank, owner)
                owner = owner or layer.branch

    @torch.no_grad()
    def fold_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Fill the branches, and take what they compute, in their 16 bits, from the weights."""
        for site, names in sites.items():
            for name in names:
                layer = network.get_submodule(name)
                layer.branch.fill_(tensors[f"{name}.up"], tensors[f"{site}.down"])
                layer.weight.copy_(layer.weight.double() - layer.branch.weight_of_product)

    def _is_small(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the factors have fewer numbers than the weights of `layers` together."""
        out, read = sum(len(layer.weight) for layer in layers), matrix_of(layers[0]).shape[1]
        return self.rank * (out + read) < out * read

    def _candidates(self, network: nn.Module, example_inputs: tuple) -> dict[str, tuple[str, ...]]:
        """{first layer: layers that can share a factor with it} of all that can have a branch."""
        layers = changeable(network, example_inputs)
        names = [name for name in without(list(layers), self.skip) if self._suits(layers[name])]
        return sharing(network, {name: layers[name] for name in names}, example_inputs)

    def _suits(self, layer: nn.Module) -> bool:
        if isinstance(layer, OnlineLayer) and layer.branch is not None:
            return False
        if isinstance(layer, nn.Linear):
            return True
        plain = layer.groups == 1 and (layer.padding_mode == "zeros" or not any(layer.padding))
        return plain and not isinstance(layer.padding, str) and (self.conv3x3 or set(layer.kernel_size) == {1})
