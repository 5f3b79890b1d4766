"""The policy "quantize every multiplication" as ordered rules, and refinements of rules for layers found by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.specs import (
    LAYER_BITS,
    SOFTMAX_BITS,
    QuantSpec,
    Rule,
    TensorSpec,
    check_bits,
    checked_widths,
    first_match,
)

BOUNDARY_HEADROOM = 2.0
SITES = ("input", "output")
KEPT_SETS = {
    # one-character globs: an AttentionBlock's own layers, but not those of the transformer blocks of other U-Nets
    "tfmq": (
        "*time_embedding.linear_1", "*conv_in", "*conv_out", "*conv_shortcut", "*downsamplers.*.conv",
        "*attentions.?", "*attentions.?.to_*",
    ),
}  # fmt: skip
"""Name -> globs of what published code leaves in full precision; `kept` takes them."""


def default_rules(
    weight_bits: int,
    activation_bits: int | Sequence[int],
    *,
    softmax_bits: int = 8,
    first_last_bits: int = 8,
    first: Sequence[str] = ("*conv_in",),
    last: Sequence[str] = ("*conv_out",),
    boundary_bits: int = 16,
    attention: bool = True,
    weight_symmetric: bool = False,
    weight_granularity: Literal["tensor", "channel", "group"] = "channel",
    group_size: int | None = None,
    activation_symmetric: bool = False,
    activation_site: Literal["input", "output"] = "input",
    bins: int = 1,
    quantize_state: bool = False,
    quantize_output: bool = False,
) -> list[Rule]:
    """Return the policy "quantize every multiplication": both operands of each layer and attention product.

    Activations are quantized per tensor. Norms, SiLU, sums and concatenations stay FP. q, k and v have a quantizer
    each, on the outputs of their linear layers.

    Args:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, layer inputs and the q, k, v of attention. Several, ascending: candidate widths, of
            which every sampling step uses one (the other widths below are the same at all steps).
        softmax_bits: 2 to 16, the attention map (zero point 0, unsigned).
        first_last_bits: 2 to 8, least width of weights and inputs in the layers of `first` and `last`. At 8 bits
            these weights keep their whole range: the last layer's inputs are nowhere negative but for SiLU's dip, so
            that what a clipped weight loses adds up over all of them and shifts the noise estimate.
        first: globs of the layers that read the sampler's state x_t; may be empty.
        last: globs of the layers that make the noise estimate; may be empty.
        boundary_bits: 2 to 16, width of the activations that enter the layers of `first` and `last`. x_t is the
            sampler's state rather than an activation: its rounding error passes into the noise estimate divided by
            the noise level. Wider than 8 bits, the range is that of the calibration data times `BOUNDARY_HEADROOM`,
            without search: Gaussian tails beyond those that calibration saw are clipped otherwise.
        attention: quantize the attention products; set False for a model without attention.
        weight_symmetric: signed weights with zero point 0; otherwise each range has a zero point.
        weight_granularity: one weight range per output ``"channel"``, per ``"tensor"``, or per ``"group"`` of
            `group_size` input channels of each output channel.
        activation_symmetric: activations with zero point 0.
        activation_site: whether a layer's ``"input"`` is quantized, or its ``"output"`` (where PTQ4DM's code has its
            quantizers: norms and sums come between, so that few multiplications read a quantized activation; the
            report says how many). The output of the layers of `last` stays FP.
        bins: ranges of every activation, of which each sampling step uses one; 1 with candidate widths.
        quantize_state: x_t at the widest of the other activations' bits and `first_last_bits`, its range found as
            theirs, in place of `boundary_bits`; at either site.
        quantize_output: the noise estimate (with the variance, if the network makes one) at that same width.

    Raises:
        ConfigError: a bit-width is out of range, or candidates do not ascend; the message names the setting.
    """
    check_bits("bits.weight", weight_bits)
    activation_bits = _checked_activation(activation_bits)
    check_bits("bits.first_last", first_last_bits)
    check_bits("bits.softmax", softmax_bits, SOFTMAX_BITS)
    check_bits("bits.boundary", boundary_bits, SOFTMAX_BITS)
    if activation_site not in SITES:
        raise ConfigError(f"quantization.activation_site={activation_site}: choose one of {', '.join(SITES)}")

    weight = TensorSpec(weight_bits, weight_symmetric, weight_granularity, group_size=group_size)
    operand = TensorSpec(activation_bits, activation_symmetric, bins=bins)
    at_input, at_output = (operand, None) if activation_site == "input" else (None, operand)
    edge, boundary = _at_the_ends(operand, first_last_bits, boundary_bits)
    read = at_input and boundary
    edge_weight = _weight_at_the_ends(weight, first_last_bits)
    of_first = QuantSpec(edge_weight, edge if quantize_state else read, at_output)
    of_last = QuantSpec(edge_weight, read, edge if quantize_output else None)
    rules = [Rule(pattern, spec) for patterns, spec in ((first, of_first), (last, of_last)) for pattern in patterns]
    if not attention:
        return [*rules, Rule("*", QuantSpec(weight, at_input, at_output))]
    softmax = TensorSpec(softmax_bits, symmetric=True, bins=bins)
    return [
        *rules,
        Rule("*to_[qkv]", QuantSpec(weight, at_input, operand)),
        Rule("*", QuantSpec(weight, at_input, at_output, softmax)),
    ]


def _checked_activation(bits: int | Sequence[int]) -> int | tuple[int, ...]:
    """The width of activations, or their candidate widths, if they are valid."""
    if isinstance(bits, Sequence):
        return checked_widths("bits.candidates", bits)
    check_bits("bits.activation", bits)
    return bits


def _weight_at_the_ends(weight: TensorSpec, first_last_bits: int) -> TensorSpec:
    """Weights of the first and last layers: `first_last_bits` or more; at 8 bits they keep their whole range."""
    edge = replace(weight, bits=max(weight.bits, first_last_bits))
    return replace(edge, metric="minmax") if edge.bits >= LAYER_BITS[1] else edge


def _at_the_ends(operand: TensorSpec, first_last_bits: int, boundary_bits: int) -> tuple[TensorSpec, TensorSpec]:
    """Activations of the first and last layers, at one width: found as the others are, and as the boundary's are."""
    widest = operand.bits[-1] if isinstance(operand.bits, tuple) else operand.bits
    edge = replace(operand, bits=max(widest, first_last_bits))
    boundary = replace(edge, bits=max(edge.bits, boundary_bits))
    if boundary.bits > LAYER_BITS[1]:
        boundary = replace(boundary, metric="minmax", headroom=BOUNDARY_HEADROOM)
    return edge, boundary


def kept(entries: Sequence[str], names: Collection[str]) -> list[Rule]:
    """Return rules that keep operations in full precision.

    Args:
        entries: globs, or names of `KEPT_SETS`. Of a set only what the network has becomes a rule: U-Nets differ in
            their layers; a glob becomes one in any case, and a rule that matches nothing is an error.
        names: of the operations that can be quantized.

    Raises:
        ConfigError: the network has no layer of a set.
    """
    rules = []
    for entry in entries:
        globs = KEPT_SETS.get(entry)
        if globs is None:
            rules.append(Rule(entry, None, "quantization.keep_fp"))
            continue
        present = [glob for glob in globs if any(fnmatchcase(name, glob) for name in names)]
        if not present:
            raise ConfigError(
                f"quantization.keep_fp=[{entry}]: the model has none of the layers {', '.join(globs)}; give globs of "
                "its own layers"
            )
        rules += [Rule(glob, None, f"quantization.keep_fp=[{entry}]") for glob in present]
    return rules


def segmented(rules: Sequence[Rule], parts: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """Return `rules` where the layers named in `parts` have a range for each part of their input channels.

    Weight and input of such a layer are both cut, and so is nothing that its rule leaves in full precision.
    """
    cut = []
    for name, segments in parts.items():
        rule = first_match(rules, name)
        if rule is not None and rule.spec is not None:
            weight, read = (spec and replace(spec, segments=segments) for spec in (rule.spec.weight, rule.spec.input))
            cut.append(Rule(name, replace(rule.spec, weight=weight, input=read), rule.reason))
    return [*cut, *rules]


def with_outputs(rules: Sequence[Rule], parts: Mapping[str, tuple[int, ...] | None], output: TensorSpec) -> list[Rule]:
    """Return `rules` where the layers named in `parts` have quantized outputs, with a range for each part (None: one).

    Layers that a rule keeps in full precision stay so.
    """
    made = []
    for name, segments in parts.items():
        rule = first_match(rules, name)
        if rule is not None and rule.spec is not None:
            made.append(Rule(name, replace(rule.spec, output=replace(output, segments=segments)), rule.reason))
    return [*made, *rules]
