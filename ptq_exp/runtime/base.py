"""`Runtime`: the protocol of what executes a quantized network, and the registry of those that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pkgutil import resolve_name
from typing import Any, Protocol

from torch import nn

from ptq_exp.errors import ConfigError

RUNTIMES: dict[str, str] = {
    "simulate": "ptq_exp.runtime.simulate:Simulate", "openvino": "ptq_exp.runtime.openvino:OpenVINO",
    "torch": "ptq_exp.runtime.torch_int8:TorchInt8",
}
"""Name -> `module:class` of a runtime, imported when it is asked for: an engine may need libraries of its own."""


@dataclass(frozen=True)
class ExecutedLayer:
    """How one operation of a network is executed.

    Attributes:
        layer: module name; `<attention>.qk` and `<attention>.av` for the products of attention.
        kind: class of the full-precision module, or of the product.
        executed: `int8`, or `float`: in floating point, quantized values or not.
        kernel: what computes it.
        macs: multiply-accumulates per sample.
        reason: why it is not executed as integers; "" where it is.
    """

    layer: str
    kind: str
    executed: str
    kernel: str
    macs: int
    reason: str

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two activations, such as q k^T and softmax(.) v of attention."""
        return "." in self.kind


class Execution(tuple[ExecutedLayer, ...]):
    """How the operations of a network are executed, in the order of its report."""

    @property
    def int8_share(self) -> float:
        """Share of the MACs of convolutions and linear layers that are executed as 8-bit integers, 0 to 1."""
        return _share(row for row in self if not row.is_product) or 0.0

    @property
    def attention_int8_share(self) -> float | None:
        """The same of the products of attention; None without attention."""
        return _share(row for row in self if row.is_product)


def _share(rows: Iterable[ExecutedLayer]) -> float | None:
    rows = list(rows)
    total = sum(row.macs for row in rows)
    return sum(row.macs for row in rows if row.executed == "int8") / total if total else None


class Runtime(Protocol):
    """Executes quantized networks. `simulate` is the definition; every other one agrees with it within a stated bound.

    Attributes:
        name: of the setting `runtime`.
        shared: whether several threads may evaluate a compiled network at once; False where it is not said.
    """

    name: str
    shared: bool

    def compile(self, network: nn.Module, example_call: tuple[Any, ...]) -> nn.Module:
        """Make a module that is called as the calibrated `network` is, and answers the same.

        Args:
            example_call: the positional arguments of one sample, first dimension 1.

        Raises:
            QuantizationError: the network cannot be executed so; the message names the layer and the reason.
        """
        ...

    def account(self) -> Execution:
        """Say how each operation of the network that was compiled last is executed."""
        ...


def runtime_of(name: str, options: Mapping[str, Any] | None = None) -> Runtime:
    """Make the runtime that the setting `runtime` names.

    Args:
        options: arguments of its constructor, such as `precision` of openvino; None = its defaults.

    Raises:
        ConfigError: there is no such runtime, it has no such option, or is not installed.
    """
    check_runtime(name)
    runtime, options = resolve_name(RUNTIMES[name]), options or {}
    if unknown := set(options) - set(signature(runtime).parameters):
        raise ConfigError(f"runtime={name} has no option {min(unknown)}")
    return runtime(**options)


def takes(name: str, option: str) -> bool:
    """Whether the constructor of the runtime `name` has the `option`."""
    return option in signature(resolve_name(RUNTIMES[name])).parameters


def check_runtime(name: Any, setting: str = "runtime") -> None:
    """Raise ConfigError unless `name` is that of a runtime; the message begins with the `setting`."""
    if not isinstance(name, str) or name not in RUNTIMES:
        raise ConfigError(f"{setting}={name}: choose one of {', '.join(RUNTIMES)}")
