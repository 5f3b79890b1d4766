"""The simulation: values are rounded to the integer grid and multiplied in floating point by torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ptq_exp.quantization.cost.account import describe
from ptq_exp.runtime.base import ExecutedLayer, Execution

_ROUNDED = "simulated: rounded to the integer grid, multiplied in floating point"


class Simulate:
    """Executes a quantized network as it is."""

    name, shared = "simulate", True

    def __init__(self) -> None:
        self._compiled: tuple[nn.Module, tuple[Any, ...]] | None = None

    def compile(self, network: nn.Module, example_call: tuple[Any, ...]) -> nn.Module:
        """Return `network` itself, whose quantizers round inside its own modules."""
        self._compiled = network, example_call
        return network

    def account(self) -> Execution:
        """List the operations of the network that was compiled last: all of them run in floating point."""
        rows = () if self._compiled is None else describe(*self._compiled).rows
        return Execution(
            ExecutedLayer(row.name, row.type, "float", "torch", row.macs, row.reason or _ROUNDED) for row in rows
        )
