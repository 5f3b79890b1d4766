"""Networks with number formats, which no engine here executes: weights are multiplied in float, activations refused."""

from __future__ import annotations

from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import ActivationQuantizer, DynamicQuantizer, quantizers
from ptq_exp.quantization.quantizer.formats import format_of


def check_formats(network: nn.Module, asked: str) -> None:
    """Raise ConfigError, beginning with the setting `asked`, if activations of `network` have a number format.

    Or ranges that follow the data.

    Their rounding can only be simulated; weights in a format are executed in float, with the values that they have.
    """
    for name, quantizer in quantizers(network):
        if isinstance(quantizer, DynamicQuantizer):
            raise ConfigError(
                f"{asked}: {name} has dynamic ranges, which are simulated only: choose runtime=simulate, or "
                "quantization.activation=static"
            )
        if isinstance(quantizer, ActivationQuantizer) and (made := format_of(quantizer)):
            raise ConfigError(
                f"{asked}: {name} rounds to the number format {made}, which is simulated only: choose "
                "runtime=simulate, or integer activations, such as bits.activation=8"
            )
