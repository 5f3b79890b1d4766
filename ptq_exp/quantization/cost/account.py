"""Report a network: its multiplications joined with the quantizers that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.calibrate import disabled, quantizers
from ptq_exp.quantization.cost.macs import Trace, multiplying_layers, trace
from ptq_exp.quantization.cost.operands import Operands, Products, operands_of
from ptq_exp.quantization.cost.report import Report
from ptq_exp.quantization.cost.row import Bits, Row
from ptq_exp.quantization.layers import (
    FULL_PRECISION,
    QUANTIZED,
    QuantAttention,
    attention_obstacle,
    bits_of,
    ordinary_type,
)
from ptq_exp.quantization.obstacles import layer_obstacles
from ptq_exp.quantization.online import Online
from ptq_exp.quantization.products import full_precision_class
from ptq_exp.quantization.quantizer import DynamicQuantizer, WeightQuantizer
from ptq_exp.quantization.quantizer.formats import format_of
from ptq_exp.quantization.trace.products import kind_of, product_site

MOST_NUMBERS = 4096
"""Of one tensor of ranges in `range_table`; weights in small groups have millions."""


def describe(model: nn.Module, example_inputs: tuple, reasons: Mapping[str, str] | None = None) -> Report:
    """Report the operations of `model`, quantized or not, by one forward with all quantizers off.

    Args:
        model: any network.
        example_inputs: positional arguments of one sample (first dimension 1).
        reasons: module name -> why it stays FP, where that is known.

    Raises:
        QuantizationError: the example holds more than one sample.
    """
    with disabled(model):
        counted = trace(model, example_inputs)
    return build_report(model, counted, reasons or {}, quantized_operands(model, example_inputs))


def multipliers(model: nn.Module, example_inputs: tuple) -> list[str]:
    """Names of the modules that multiply activations themselves and can be quantized, by one forward.

    `Attention` of `diffusers` that is quantized by its softmax map is not among them.
    """
    with disabled(model):
        return [name for name, found in trace(model, example_inputs).multipliers.items() if not found.obstacle]


def quantized_operands(model: nn.Module, example_inputs: tuple) -> Operands:
    """Return what the multiplications of `model` read, by one forward with quantizers off; nothing if it has none."""
    if next(quantizers(model), None) is None:
        return Operands()
    with disabled(model):
        return operands_of(model, example_inputs)


def build_report(model: nn.Module, counted: Trace, reasons: Mapping[str, str], products: Operands) -> Report:
    """Join the multiplications counted in full precision with the quantizers that their operands come from."""
    reasons = {name: f"left alone: {why}" for name, why in layer_obstacles(model).items()} | reasons
    layers = dict(multiplying_layers(model))
    holders = dict(parameter_holders(model))
    rows: list[Row] = []
    for name, module in model.named_modules():
        if name in counted.multipliers:
            rows += _product_rows(name, module, counted, reasons, products)
        if isinstance(module, Online):
            rows.append(_online_row(name, module, counted.layer_macs.get(name, 0)))
        elif name in layers:
            macs = counted.layer_macs.get(name, 0)
            rows.append(_layer_row(name, module, macs, reasons, products.layers.get(name)))
        elif isinstance(module, Attention) and name not in counted.multipliers:
            macs = counted.attention_macs[name]
            rows += _attention_rows(name, module, macs, reasons, products.attention.get(name))
        elif name in holders:
            reason = f"left alone: {_type_name(module)} has no quantized counterpart"
            rows.append(_fp_row(name, _type_name(module), _own_params(module), 0, reasons.get(name, reason)))
    outside = min(counted.outside_macs, counted.other_macs)
    others = counted.other_macs - outside
    if outside:
        row = _fp_row("(outside)", "(outside)", 0, outside, "computed outside of convolution and linear layers")
        rows.append(replace(row, scope="conv_linear"))
    if others:
        rows.append(_fp_row("(other)", "(other)", 0, others, "multiplied outside the modules above"))
    params = sum(p.numel() for p in model.parameters())
    not_counted = tuple(f"{name} (called {n} times)" for name, n in sorted(counted.uncounted.items()))
    return Report(tuple(rows), params - sum(row.params for row in rows), not_counted=not_counted)


def range_table(model: nn.Module) -> dict[str, dict]:
    """Return the ranges of every quantizer, ready for JSON.

    Of each its bits (a list of candidates), symmetry, segments and ``[rows][segments]`` lists of its four buffers; of a
    buffer with more than `MOST_NUMBERS` the least, the middle and the largest number.

    Raises:
        QuantizationError: a quantizer is not calibrated.
    """
    found = {}
    for name, quantizer in quantizers(model):
        if not quantizer.ready:
            raise QuantizationError(f"{name}: not calibrated, it has no range to report")
        found[name] = {
            "bits": list(quantizer.bits) if isinstance(quantizer.bits, tuple) else quantizer.bits,
            "symmetric": quantizer.symmetric,
            "segments": quantizer.segments,
            **({"format": format_of(quantizer)} if format_of(quantizer) else {}),
            **({"dynamic": quantizer.share} if hasattr(quantizer, "share") else {}),
        }
        for buffer in ("scale", "zero_point", "qmin", "qmax"):
            found[name][buffer] = _shown(getattr(quantizer, buffer))
    return found


def _shown(numbers: Tensor) -> list | dict[str, float]:
    """Return all numbers as lists, or what sums up more of them than anybody reads."""
    if numbers.numel() <= MOST_NUMBERS:
        return numbers.tolist()
    found = {"min": numbers.min(), "median": numbers.median(), "max": numbers.max()}
    return {"numbers": numbers.numel(), **{name: float(value) for name, value in found.items()}}


def parameter_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the modules that own a matrix or kernel themselves (not norms, not biases)."""
    for name, module in model.named_modules():
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            yield name, module


def _layer_row(
    name: str, layer: nn.Module, macs: int, reasons: Mapping[str, str], products: Products | None
) -> Row:
    """Of a layer that the example never called its own quantizers count."""
    quantizer, own_input = getattr(layer, "weight_quantizer", None), getattr(layer, "input_quantizer", None)
    bits = bits_of(quantizer), bits_of(own_input)
    if macs:
        operands = products or []
        weights = {operand.quantizer is quantizer for _, operand in operands}
        bits = bits[0] if weights == {True} else None, _common_bits(operands, 0)
    size = 4.0 * _own_params(layer)
    stored = 0.0
    if isinstance(quantizer, WeightQuantizer):
        stored = quantizer.stored_bytes(layer.weight)
        size += stored - 4 * layer.weight.numel()
    reason = "" if None not in bits else reasons.get(name) or _why_fp(layer, *bits)
    row = Row(name, _type_name(layer), "conv_linear", _own_params(layer), macs, *bits, size, reason)
    return replace(
        row, weight_format=format_of(quantizer) if bits[0] else "", quantized_bytes=stored,
        activation_format=(_common_format(products or [], 0) if macs else format_of(own_input)) if bits[1] else "",
        quantized_params=layer.weight.numel() if stored else 0,
        dynamic_scales=_dynamic_scales(layer, own_input, macs),
    )


def _online_row(name: str, part: Online, macs: int) -> Row:
    """Return the row of what a transform computes at run time."""
    return Row(
        name, type(part).__name__, "conv_linear", 0, macs, None, None, part.bytes, part.meaning, added=part.bits
    )


def _attention_rows(
    name: str, attention: Attention, macs: tuple[int, int], reasons: Mapping[str, str], products: Products | None
) -> list[Row]:
    """Return the rows of q k^T and softmax(.) v."""
    obstacle = "" if type(attention) in (Attention, QuantAttention) else "a subclass of Attention"
    obstacle = obstacle or attention_obstacle(attention)
    operands = [] if obstacle or products is None or len(products) % 2 else products
    prefix = f"{name}." if name else ""
    why = reasons.get(name) or obstacle or "q, k, v or the softmax map has no quantizer"
    return [
        _product_row(f"{prefix}{product}", f"Attention.{product}", count, pairs, why)
        for product, count, pairs in (("qk", macs[0], operands[::2]), ("av", macs[1], operands[1::2]))
    ]


def _product_rows(
    name: str, module: nn.Module, counted: Trace, reasons: Mapping[str, str], products: Operands
) -> list[Row]:
    """Return the rows of the products of a module that multiplies activations."""
    multiplier, rows = counted.multipliers[name], []
    why = f"left alone: {multiplier.obstacle}" if multiplier.obstacle else "an operand has no quantizer"
    for key in multiplier.keys:
        site, kind = product_site(name, key), f"{_type_name(module)}.{kind_of(key)}"
        pairs, macs = products.products.get(site, []), counted.product_macs[site]
        rows.append(_product_row(f"{name}.{key}" if name else key, kind, macs, pairs, reasons.get(name) or why))
    return rows


def _product_row(name: str, kind: str, macs: int, pairs: Products, why: str) -> Row:
    """Return the row of a product of activations; `why` an operand stays FP, if one does."""
    bits = _common_bits(pairs, 1), _common_bits(pairs, 0)
    return Row(
        name, kind, "attention", 0, macs, *bits, 0.0, "" if None not in bits else why,
        weight_format=_common_format(pairs, 1), activation_format=_common_format(pairs, 0),
        dynamic_scales=sum(isinstance(operand.quantizer, DynamicQuantizer) for pair in pairs for operand in pair),
    )


def _common_bits(products: Products, number: int) -> Bits:
    """Bits of operand `number` of each of `products`; None where one is FP, or they have different ones."""
    found = {bits_of(operands[number].quantizer) for operands in products}
    return found.pop() if len(found) == 1 else None


def _common_format(products: Products, number: int) -> str:
    """Return the format of operand `number` of each of `products`; "" of integers, or of different ones."""
    found = {format_of(operands[number].quantizer) for operands in products}
    return found.pop() if len(found) == 1 else ""


def _dynamic_scales(layer: nn.Module, quantizer: nn.Module | None, macs: int) -> int:
    """Return how many ranges the input of `layer` has per sample that follow the data."""
    if not isinstance(quantizer, DynamicQuantizer) or not macs:
        return 0
    if not isinstance(layer, nn.Linear) or quantizer.share == "tensor":
        return 1
    groups = 1 if quantizer.share == "token" else -(-layer.in_features // quantizer.share)
    return macs // layer.weight.numel() * groups


def _fp_row(name: str, kind: str, params: int, macs: int, reason: str) -> Row:
    return Row(name, kind, "other", params, macs, None, None, 4.0 * params, reason)


def _why_fp(layer: nn.Module, weight_bits: int | None, activation_bits: Bits) -> str:
    if type(layer) not in QUANTIZED and type(layer) not in FULL_PRECISION:
        bases = [base.__name__ for base in QUANTIZED if isinstance(layer, base)]
        why = f"is a subclass of {bases[0]}" if bases else "has no quantized counterpart"
        return f"left alone: {_type_name(layer)} {why}"
    missing = [n for n, bits in (("weight", weight_bits), ("input", activation_bits)) if bits is None]
    if any(bits_of(getattr(layer, f"{name}_quantizer", None)) is not None for name in missing):
        return "its weight is used outside of its own forward, too, or without its quantizers"
    return f"no quantizer on {' and '.join(missing)}"


def _type_name(module: nn.Module) -> str:
    return full_precision_class(ordinary_type(module)).__name__


def _own_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
