"""The runtime `torch`: layers on torch's own 8-bit operators, nothing to install, nothing to compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import step_of
from ptq_exp.quantization.cost.account import describe
from ptq_exp.runtime.base import ExecutedLayer, Execution
from ptq_exp.runtime.deployable import Deployable, deployable
from ptq_exp.runtime.not_a_number import keep_nan
from ptq_exp.runtime.plain_layers import IntegerLayer, Row
from ptq_exp.runtime.plan import FLOAT, INT8, Plan, check_weights, entry_of, integer_plan, layers_of
from ptq_exp.runtime.probe import check_sums
from ptq_exp.runtime.torch_kernels import IntMMLayer, OneDNNLayer, fits_int_mm, kernel_of

LAYERS: dict[str, type[IntegerLayer]] = {"cpu": OneDNNLayer, "cuda": IntMMLayer}
"""Type of device -> what executes layers as integers there."""
_PRODUCT = "torch has no integer product of two activations"


class TorchInt8:
    """Executes quantized networks by torch: oneDNN's 8-bit kernels on CPUs, `torch._int_mm` on NVIDIA GPUs.

    Attention products are multiplied in floating point, on quantized operands; on GPUs so are all convolutions but
    those of 1x1.

    Args:
        precision: of what is not executed as integers; f32 alone.
        weights, regrid: see `ptq_exp.runtime.openvino.OpenVINO`.

    Raises:
        ConfigError: a value is none of the above.
    """

    name = "torch"

    def __init__(self, precision: str = "f32", weights: str = "as_saved", regrid: bool = False) -> None:
        if precision != "f32":
            raise ConfigError(f"runtime.precision={precision}: runtime=torch computes the rest in f32: leave it out")
        check_weights(weights)
        self.weights, self.regrid = weights, regrid
        self._made: tuple[nn.Module, tuple[Any, ...], Plan, IntegerNetwork] | None = None

    def compile(self, network: nn.Module, example_call: tuple[Any, ...]) -> IntegerNetwork:
        """Make the module that is called as `network` is, after a probe of the processor's 8-bit sums.

        Raises:
            ConfigError: a layer cannot be executed, or the sums saturate; it says what to choose.
        """
        device = next(network.parameters()).device
        if device.type not in LAYERS:
            raise ConfigError(f"runtime=torch has no integer kernels on {device.type}: use cpu or cuda")
        kind = LAYERS[device.type]
        if device.type == "cpu":  # sums of `_int_mm` are those of 32-bit integers
            check_sums(lambda probe: kind(probe.convolution, probe.plan, Row()), self.weights, self.name)
        made, plan = integer_network(network, kind, regrid=self.regrid, seven_bits=self.weights == "7bit")
        self._made = network, tuple(example_call), plan, made
        return made

    def account(self) -> Execution:
        """Say how each operation of the network that was compiled last is executed."""
        if self._made is None:
            return Execution()
        network, example, plan, made = self._made
        return Execution(_executed(row, plan, made.plain.network) for row in describe(network, example).rows)


class IntegerNetwork(nn.Module):
    """A network of integer layers, called as the original: eps = network(x, t, **conditions)."""

    def __init__(self, plain: Deployable, step: nn.Module | None) -> None:
        super().__init__()
        self.plain, self.step = plain, step  # samplers choose the row of ranges by it

    @torch.no_grad()
    def forward(self, *tensors: Tensor, **conditions: Tensor) -> Tensor:
        """Return the network's output.

        Raises:
            QuantizationError: there are several rows of ranges, and none was chosen.
        """
        if self.plain.rows > 1:
            if self.step is None or not self.step.is_set or len(self.step.row) != 1:
                raise QuantizationError(
                    "the network has several rows of ranges and none was chosen: call select_row first"
                )
            self.plain.set_row(self.step.row)
        inputs = [part.float() if part.is_floating_point() else part for part in tensors]
        answer = self.plain.network(*inputs, **conditions)
        return keep_nan(answer, (*tensors, *conditions.values())).to(tensors[0].dtype)


def integer_network(
    network: nn.Module, kind: type[IntegerLayer], *, regrid: bool = False, seven_bits: bool = False
) -> tuple[IntegerNetwork, Plan]:
    """Make the network whose layers are `kind`, where that executes them, and the plan that it follows.

    Raises:
        ConfigError: a layer cannot be executed; it says what to choose.
    """
    plan = integer_plan(network, regrid=regrid, seven_bits=seven_bits, asked="runtime=torch")
    if kind is IntMMLayer:
        for name, layer, entry in list(layers_of(network, plan)):
            if entry.is_layer and entry.executed == INT8 and not fits_int_mm(layer):
                plan[name] = replace(entry, executed=FLOAT, reason="torch._int_mm multiplies matrices, not this kernel")
    plain = deployable(network, plan, kind).to(next(network.parameters()).device)
    plain.network.to(memory_format=torch.channels_last)
    return IntegerNetwork(plain, step_of(network)), plan


def _executed(row: Any, plan: Plan, network: nn.Module) -> ExecutedLayer:
    """Say how an operation of the report is executed."""
    entry = entry_of(plan, row)
    if entry is None or not entry.is_layer:
        reason = row.reason or "not quantized"
        if entry is not None:
            reason = _PRODUCT if entry.executed == INT8 else entry.reason
        return ExecutedLayer(row.name, row.type, FLOAT, "torch", row.macs, reason)
    layer = network.get_submodule(row.name)
    executed = INT8 if isinstance(layer, IntegerLayer) else FLOAT
    return ExecutedLayer(row.name, row.type, executed, kernel_of(layer), row.macs, entry.reason)
