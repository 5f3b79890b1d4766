"""What of a quantized network an engine can execute as integers: levels, scales and grids of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    ActivationQuantizer,
    DynamicQuantizer,
    QuantAttention,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    Row,
    quantizers,
)
from ptq_exp.quantization.products import QuantizedProduct
from ptq_exp.quantization.quantizer import Quantizer
from ptq_exp.quantization.quantizer.formats import format_of
from ptq_exp.quantization.trace.products import product_site
from ptq_exp.runtime.grouped import SMALLEST, GroupedWeight, grouped_weight
from ptq_exp.runtime.integers import BYTE, SEVEN_BITS, Grid, IntegerWeight, grids, regridded, shifted

INT8, FLOAT = "int8", "float"
ATTENTION, PRODUCT = "Attention", "Product"


WEIGHTS = ("as_saved", "7bit")
"""What weights are executed: the saved ones, or re-gridded to 7 bits for CPUs whose 8-bit sums saturate."""
GROUPS = "groups"
"""The saved ones, and of linear layers also 4-bit groups as they are: `ptq_exp.runtime.grouped`."""


def check_weights(weights: str, known: tuple[str, ...] = WEIGHTS) -> None:
    """Raise ConfigError unless `weights` is one of the `known`."""
    if weights not in known:
        raise ConfigError(f"runtime.weights={weights}: choose one of {', '.join(known)}")


@dataclass(frozen=True)
class LayerPlan:
    """How one layer, the two products of one attention, or one product of any other module is executed.

    Attributes:
        kind: name of the layer's class; `ATTENTION` or `PRODUCT`.
        executed: INT8 or FLOAT, as planned; what an engine made of it stands in its own account.
        reason: why in float, or what had to be changed; empty otherwise.
        weights: for each segment of input channels.
        inputs: grids, one for each segment; none where the input is not quantized.
        output: grid of the output; None where it is not quantized.
        segments: input channels of each segment, empty for a single one.
        grouped: the weight of a layer that is executed with its groups, whose input the engine quantizes.
    """

    name: str
    kind: str
    executed: str
    reason: str = ""
    weights: tuple[IntegerWeight, ...] = ()
    inputs: tuple[Grid, ...] = ()
    output: Grid | None = None
    segments: tuple[int, ...] = ()
    grouped: GroupedWeight | None = None

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or linear layer."""
        return self.kind not in (ATTENTION, PRODUCT)


Plan = dict[str, LayerPlan]


def integer_plan(
    network: nn.Module, *, regrid: bool = False, seven_bits: bool = False, groups: bool = False,
    asked: str = "runtime=openvino",
) -> Plan:
    """Plan the execution of every quantized layer of a calibrated `network`, by module name.

    Args:
        regrid: quantize weights with several scales per output channel anew, symmetric, 8 bits per channel.
        groups: let linear layers keep 4-bit weights in groups, see `ptq_exp.runtime.grouped`.
        seven_bits: the same for weights with levels beyond +-64, for CPUs whose 8-bit sums saturate.
        asked: the setting that asks for it; the message of an error begins with it.

    Raises:
        ConfigError: a layer has a scale for each group of input channels, and `regrid` is off; or activations have a
            number format.
    """
    _check_formats(network, asked)
    plan: Plan = {}
    for name, layer in network.named_modules():
        if isinstance(layer, QuantConv1d | QuantConv2d | QuantLinear):
            grouped = grouped_weight(layer) if groups else None
            plan[name] = _layer(name, layer, regrid, seven_bits, asked, grouped)
        elif isinstance(layer, QuantAttention):
            plan[name] = _attention(name, layer)
        elif isinstance(layer, QuantizedProduct):
            plan[name] = _product(name, layer)
    return plan


def _check_formats(network: nn.Module, asked: str) -> None:
    """Raise ConfigError, beginning with the setting `asked`, if activations follow the data or have a number format.

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


def entry_of(plan: Plan, row: Row) -> LayerPlan | None:
    """Return how the operation of a report's `row` is planned; None if it is not."""
    if row.scope != "attention":
        return plan.get(row.name)
    module, _, key = row.name.rpartition(".")
    return plan.get(product_site(module, key)) or plan.get(module)


def _layer(
    name: str, layer: nn.Module, regrid: bool, seven_bits: bool, asked: str, grouped: GroupedWeight | None
) -> LayerPlan:
    inputs = grids(layer.input_quantizer)
    outputs = grids(layer.output_quantizer)
    made = LayerPlan(name, type(layer).__name__.removeprefix("Quant"), FLOAT, inputs=inputs,
                     output=outputs[0] if len(outputs) == 1 else None)
    if len(outputs) > 1:
        raise ConfigError(
            f"{asked}: {name} has {len(outputs)} ranges of its output, which no engine executes: choose "
            "quantization.time_embedding=shared or none"
        )
    weight_quantizer = layer.weight_quantizer
    segments = layer.input_quantizer.segments if inputs else None
    made = replace(made, segments=tuple(segments or ()))
    if not isinstance(weight_quantizer, Quantizer):
        return replace(made, reason="its weight is not quantized")
    if made_of := format_of(weight_quantizer):
        return replace(made, reason=f"number format {made_of}: simulated only")
    if weight_quantizer.bits > 8:
        return replace(made, reason=f"{weight_quantizer.bits}-bit weights")
    if not inputs:
        return replace(made, reason="its input is not quantized")
    if any(grid.levels > BYTE for grid in inputs):
        return replace(made, reason=f"{layer.input_quantizer.bits}-bit input")
    if grouped is not None and not made.segments:
        reason = f"4-bit groups of {grouped.size}, the engine quantizes the input"
        return replace(made, executed=INT8, reason=reason, inputs=(), grouped=grouped)
    weights, reason = _weights(name, layer, made.segments, regrid, seven_bits, asked)
    return replace(made, executed=INT8, reason=reason, weights=weights)


def _weights(
    name: str, layer: nn.Module, segments: tuple[int, ...], regrid: bool, seven_bits: bool, asked: str
) -> tuple[tuple[IntegerWeight, ...], str]:
    """Return the weight of each segment, and what was changed."""
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    own = tuple(quantizer.segments or ())
    parts = list(weight.split(segments, 1)) if segments else [weight]
    if own not in ((), segments):
        if not regrid:
            size = max(own)
            groups = asked == "runtime=openvino" and isinstance(layer, nn.Linear) and quantizer.bits <= 4
            hint = f"runtime.weights=groups (with quantization.group_size={SMALLEST} or more), " if groups else ""
            raise ConfigError(
                f"{asked}: {name} has a scale for every {size} input channels, which it cannot run: choose "
                f"quantization.weight_granularity=channel, {hint}or runtime.regrid=true"
            )
        return tuple(map(regridded, parts)), f"re-gridded: it had {len(own)} scales per channel"
    lowest = (quantizer.qmin - quantizer.zero_point).int()
    levels = quantizer.integers(weight) + quantizer._aligned(lowest, weight, None)
    found = []
    for n, part in enumerate(levels.split(segments, 1) if segments else [levels]):
        column = min(n, quantizer.scale.shape[1] - 1)
        scale = quantizer.scale[:, column].expand(len(weight)).clone()
        found.append(shifted(part, scale))
    if seven_bits and any(int(part.levels.abs().max()) > SEVEN_BITS for part in found):
        return tuple(regridded(part, SEVEN_BITS - 1) for part in parts), "re-gridded to 7 bits"
    return tuple(found), ""


def _attention(name: str, attention: nn.Module) -> LayerPlan:
    """Plan the products q k^T and softmax v of one attention; its grids are those of softmax, q, k and v."""
    softmax = grids(attention.softmax_quantizer)
    operands = [grids(getattr(layer, "output_quantizer", None)) for layer in (attention.to_q, attention.to_k,
                                                                              attention.to_v)]
    made = LayerPlan(name, ATTENTION, FLOAT, output=softmax[0] if softmax else None)
    if any(len(found) != 1 for found in operands):
        return replace(made, reason="q, k or v is not quantized")
    inputs = tuple(found[0] for found in operands)
    made = replace(made, inputs=inputs)
    if any(grid.levels > BYTE for grid in inputs):
        return replace(made, reason="q, k or v has more than 8 bits")
    if not all(grid.symmetric or grid.one_sided for grid in inputs):
        return replace(made, reason="q, k or v is asymmetric")
    if not softmax or softmax[0].levels > BYTE:
        return replace(made, reason="the softmax map has more than 8 bits")
    return replace(made, executed=INT8)


def _product(name: str, product: QuantizedProduct) -> LayerPlan:
    """Plan one product of two activations; its grids are those of its operands."""
    left, right = grids(product.left_quantizer), grids(product.right_quantizer)
    made = LayerPlan(name, PRODUCT, FLOAT, inputs=(*left, *right))
    if not left or not right:
        return replace(made, reason="an operand is not quantized")
    if any(grid.levels > BYTE for grid in made.inputs):
        return replace(made, reason="an operand has more than 8 bits")
    if not all(grid.symmetric or grid.one_sided for grid in made.inputs):
        return replace(made, reason="an operand is asymmetric")
    if any(grid.rows > 1 for grid in made.inputs):
        return replace(made, reason="its ranges change between sampling steps")
    return replace(made, executed=INT8)


def layers_of(network: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, LayerPlan]]:
    """Name, module and plan of every planned layer of a network of the same structure."""
    for name, layer_plan in plan.items():
        yield name, network.get_submodule(name), layer_plan
