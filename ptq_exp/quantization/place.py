"""`quantize_`: place quantizers in a network by ordered rules, and report every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization.calibrate import quantizers
from ptq_exp.quantization.cost.account import build_report, parameter_holders, quantized_operands
from ptq_exp.quantization.cost.macs import trace
from ptq_exp.quantization.cost.operands import Products
from ptq_exp.quantization.cost.report import Report
from ptq_exp.quantization.layers import (
    QUANTIZED,
    QuantAttention,
    attention_obstacle,
    attention_quantizers,
    layer_quantizers,
    restore_type_,
    retype_,
)
from ptq_exp.quantization.obstacles import check_initialised, layer_obstacles, weight_marks
from ptq_exp.quantization.products import QuantizedProduct, multiply_quantized_, product_quantizers
from ptq_exp.quantization.quantizer import ActivationQuantizer, Quantizer
from ptq_exp.quantization.quantizer.time_step import Step
from ptq_exp.quantization.specs import Rule, check_rules, first_match
from ptq_exp.quantization.trace.products import Multiplier


def quantize_(model: nn.Module, rules: Sequence[Rule], example_inputs: tuple) -> Report:
    """Give the layers of `model` the quantizers that `rules` ask for, in place; nothing is calibrated yet.

    Exact `nn.Conv1d`, `nn.Conv2d`, `nn.Linear` and `diffusers` `Attention` are retyped; subclasses of them, layers
    whose weight is computed or shared, and other modules with weights are left alone and named in the report. If
    anything is wrong, the model is left unchanged. Activations with candidate widths, or bins of sampling steps, share
    one `Step`, which says which of them is in force.

    Args:
        model: full-precision network.
        rules: the first whose pattern matches a module's name decides; no match keeps it in full precision.
        example_inputs: arguments of one sample, for the forward that counts multiplications: positional ones, and
            keyword arguments in a mapping at their end.

    Raises:
        QuantizationError: the model is quantized already, a layer has no weights yet, or segments do not fit one.
        ConfigError: a rule matches nothing, or activations have different numbers of candidate widths or bins.
    """
    if next(quantizers(model), None) is not None:
        raise QuantizationError("the model is quantized already: quantize_ wants a full-precision model")
    check_initialised(model)
    obstacles = layer_obstacles(model)
    layers = {name: m for name, m in model.named_modules()
              if type(m) in QUANTIZED and not isinstance(m, Attention) and name not in obstacles}
    marks = weight_marks(layers)
    counted = trace(model, example_inputs)
    names = {name: m for name, m in model.named_modules()
             if name in layers or type(m) is Attention or name in counted.multipliers}
    check_rules(rules, names, [name for name, _ in parameter_holders(model) if name not in names])
    products, reasons = _plan_products(counted.multipliers, rules, names)
    plan: dict[str, dict[str, nn.Module]] = {}
    for name, module in names.items():
        if name not in counted.multipliers:
            placed, reasons[name] = _plan(module, _without_operand(first_match(rules, name), name, products), name)
            if placed:
                plan[name] = placed
    reasons |= _kept_by_rule(model, rules, names)
    for name, mark in weight_marks(layers).items():
        if mark != marks[name]:
            plan.pop(name, None)
            reasons[name] = "left alone: its weight is changed when the network runs"
    _share_step([*plan.values(), *products.values()])
    for name, placed in plan.items():
        retype_(names[name], placed)
    for name, placed in products.items():
        multiply_quantized_(names[name], placed, counted.multipliers[name], name)
    _use_explicit_paths(model)
    operands = quantized_operands(model, example_inputs)
    for name in layers.keys() & plan.keys():
        used = counted.layer_macs.get(name) or name in counted.used_outside
        if used and _bypassed(layers[name], operands.layers.get(name, [])):
            restore_type_(layers[name])
            reasons[name] = "left alone: its weight is used outside of its own forward"
    return build_report(model, counted, {name: reason for name, reason in reasons.items() if reason}, operands)


def _plan_products(
    multipliers: Mapping[str, Multiplier], rules: Sequence[Rule], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, QuantizedProduct]], dict[str, str]]:
    """Return {module: its products' quantizers}, and {module: reason} of those without."""
    placed: dict[str, dict[str, QuantizedProduct]] = {}
    reasons: dict[str, str] = {}
    device = next((tensor.device for m in modules.values() for tensor in m.parameters()), None)
    for name, multiplier in multipliers.items():
        rule, module = first_match(rules, name), modules[name]
        if rule is None or rule.spec is None:
            reasons[name] = _reason(rule)
        elif multiplier.obstacle:
            reasons[name] = f"left alone: {multiplier.obstacle}"
        elif rule.spec.product is None:
            obstacle = attention_obstacle(module) if type(module) is Attention else None
            reasons[name] = f"left alone: {obstacle}" if obstacle else f"rule {rule.pattern!r} quantizes no products"
        else:
            made = product_quantizers(multiplier, rule.spec, name)
            placed[name] = {key: product.to(device) for key, product in made.items()}
    return placed, reasons


def _without_operand(rule: Rule | None, name: str, products: Collection[str]) -> Rule | None:
    """`rule` without the output that is an operand, where a module around the layer quantizes its own operands."""
    if rule is None or rule.spec is None or not rule.spec.is_operand:
        return rule
    around = name.rpartition(".")[0]
    if any(module == around or module.startswith(f"{around}.") for module in products):
        return replace(rule, spec=replace(rule.spec, output=None))
    return rule


def _bypassed(layer: nn.Module, products: Products) -> bool:
    """Whether none of the multiplications of `layer` reads what its own quantizers return."""
    own = {q for q in (layer.weight_quantizer, layer.input_quantizer) if isinstance(q, Quantizer)}
    return bool(own) and not any(operand.quantizer in own for pair in products for operand in pair)


def _use_explicit_paths(model: nn.Module) -> None:
    """Let modules that have a fused path around their layers, which no quantizer sees, call the layers instead."""
    for module in model.modules():
        if isinstance(module, QuantAttention):
            module.set_processor(AttnProcessor())
        quantized = any(isinstance(child, Quantizer) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and quantized:
            module.activation_relu_or_gelu = 0  # it is asked for this path alone
        elif isinstance(module, nn.TransformerEncoder) and quantized:
            module.use_nested_tensor = False


def _plan(module: nn.Module, rule: Rule | None, name: str) -> tuple[dict[str, nn.Module], str]:
    """Return the quantizers for one module, and the reason if there are none."""
    if rule is None or rule.spec is None:
        return {}, _reason(rule)
    if not isinstance(module, Attention):
        if rule.spec.weight is rule.spec.input is rule.spec.output is None:
            return {}, f"rule {rule.pattern!r} quantizes neither weight nor input nor output"
        return layer_quantizers(module, rule.spec, name), ""
    if rule.spec.softmax is None:
        return {}, f"rule {rule.pattern!r} quantizes no softmax map"
    if obstacle := attention_obstacle(module):
        return {}, f"left alone: {obstacle}"
    return attention_quantizers(rule.spec, name), ""


def _share_step(placed: Sequence[Mapping[str, nn.Module]]) -> None:
    """Let those of the quantizers in `placed` that have several rows choose among them by one `Step`.

    Raises:
        ConfigError: they have different numbers of rows.
    """
    found = [module for made in placed for child in made.values() for module in child.modules()]
    switched = [module for module in found if isinstance(module, ActivationQuantizer) and module.step is not None]
    counts = {quantizer.step.rows: quantizer for quantizer in switched}
    if len(counts) > 1:
        one, other = list(counts.values())[:2]
        raise ConfigError(
            f"{one.name} has the candidate widths {one.bits} and {other.name} {other.bits}, or other bins: they are "
            "chosen by one number per sampling step, so give all activations that have several equally many"
        )
    for rows in counts:
        step = Step(rows)
        for quantizer in switched:
            quantizer.step = step


def _kept_by_rule(
    model: nn.Module, rules: Sequence[Rule], quantizable: dict[str, nn.Module]
) -> dict[str, str]:
    """Return the reasons that rules give for modules which could not be quantized anyway."""
    others = [name for name, _ in parameter_holders(model) if name not in quantizable]
    return {name: _reason(rule) for name in others if (rule := first_match(rules, name)) and rule.spec is None}


def _reason(rule: Rule | None) -> str:
    return "no rule matches" if rule is None else rule.reason or f"kept by rule {rule.pattern!r}"
