"""What a transform of a network is: an exact change of its weights, made before anything is rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ptq_exp.quantization.specs import Rule

Sites = Mapping[str, tuple[str, ...]]
"""Where a transform works: name of a module, or what layers have in common -> the layers whose weights change."""


@dataclass(frozen=True)
class Fitting:
    """What a transform is fitted on.

    Attributes:
        run: passes all calibration calls through a network, in batches; hooks see what its modules read and make.
        rules: those that will place the quantizers, for transforms that look at the error of rounding.
    """

    run: Callable[[nn.Module], object]
    rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Cost:
    """What a transform adds at run time: multiply-accumulates per sample, and bytes of stored numbers."""

    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of both."""
        return Cost(self.macs + other.macs, self.bytes + other.bytes)


@dataclass(frozen=True)
class Transform(ABC):
    """A frozen dataclass whose fields are its settings, plain values for JSON.

    In full precision the network computes the same function afterwards. Transforms are applied one after the other,
    each found and fitted on the network that those before it left. Register a class in `TRANSFORMS`.
    """

    name: ClassVar[str]
    uses_rules: ClassVar[bool] = False
    """Whether `fit` looks at `Fitting.rules`; if not, runs that differ in their bits alone share what was fitted."""

    uses_data: ClassVar[bool] = True
    """Whether `fit` looks at `Fitting.run`; if not, it goes with a calibration without samples."""

    @abstractmethod
    def find(self, network: nn.Module, example_inputs: tuple) -> Sites:
        """Return where the transform can work in the full-precision `network`; nothing is changed.

        Args:
            network: in evaluation mode.
            example_inputs: positional arguments of one sample.
        """

    def chosen(self, sites: Sites, rules: Sequence[Rule]) -> Sites:
        """Return those of `sites` where it is of use in a network quantized by `rules`; the default takes all."""
        return sites

    def left(self, network: nn.Module, example_inputs: tuple) -> dict[str, str]:
        """Return {layer: reason} of the layers of `network` that it cannot work on and should; the default: none."""
        return {}

    @abstractmethod
    def fit(self, network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
        """Return what `apply_` needs, as plain tensors under names of its own; nothing is changed."""

    @abstractmethod
    def fold_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Change the weights of `network` in place."""

    def install_(self, network: nn.Module, sites: Sites) -> None:  # noqa: B027  most need nothing
        """Give `network` the parameters and hooks that it needs at run time, in place; the default needs none.

        The parameters are part of the state of the network: `fold_` fills them, and so does loading a saved network,
        whose weights are changed already.
        """

    def cost(self, network: nn.Module, sites: Sites, layer_macs: Mapping[str, int]) -> Cost:
        """Return what `install_` adds; the report of the network counts the same. The default adds nothing.

        What is made of `ptq_exp.quantization.online` is counted anyway and stands for itself.

        Args:
            layer_macs: multiply-accumulates per sample of each layer, before.
        """
        return Cost()

    def apply_(self, network: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        """Transform `network` in place."""
        self.install_(network, sites)
        # the last bits of a product depend on the order of its operands in memory, which no file keeps
        self.fold_(network, sites, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings as plain values for JSON."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Applied:
    """A transform that a network has.

    Attributes:
        transform: with its settings.
        sites: where it works.
        tensors: what was fitted; empty for a network that was loaded, whose weights are changed already.
        cost: at run time.
        left: {layer: reason} of those that it could not work on.
    """

    transform: Transform
    sites: Sites
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    cost: Cost = Cost()
    left: Mapping[str, str] = field(default_factory=dict)

    def apply_(self, network: nn.Module) -> None:
        """Transform another copy of the network that this was fitted on, in place."""
        self.transform.apply_(network, self.sites, self.tensors)

    def install_(self, network: nn.Module) -> None:
        """Prepare `network` to be loaded with transformed weights, in place."""
        self.transform.install_(network, self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the record of it as plain values for JSON: settings, places and cost; see `applied_from_dict`."""
        sites = {site: list(layers) for site, layers in self.sites.items()}
        left = {"left": dict(self.left)} if self.left else {}
        return {**self.transform.to_dict(), "sites": sites, **asdict(self.cost), **left}
