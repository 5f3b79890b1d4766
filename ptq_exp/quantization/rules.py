"""The rules of a policy, and refinements of rules for layers found by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.granularity import segmented_as
from ptq_exp.quantization.policy import Policy
from ptq_exp.quantization.specs import QuantSpec, Rule, TensorSpec, first_match
from ptq_exp.quantization.widths import LAYER_BITS, Widths, at_least, width_of

BOUNDARY_HEADROOM = 2.0
FIRST, LAST = ("*conv_in",), ("*conv_out",)
"""Globs of the first and last layers where a policy names none: those of U-Nets in `diffusers`."""
OPERANDS = "*to_[qkv]"
"""Glob of the linear layers whose outputs attention multiplies."""
@dataclass(frozen=True)
class KeptSet:
    """Operations that stay in full precision: their globs, and why."""

    globs: tuple[str, ...]
    why: str


KEPT_SETS = {
    # one-character globs: an AttentionBlock's own layers, but not those of the transformer blocks of other U-Nets
    "tfmq": KeptSet(
        ("*time_embedding.linear_1", "*conv_in", "*conv_out", "*conv_shortcut", "*downsamplers.*.conv",
         "*attentions.?", "*attentions.?.to_*"),
        "the published code of TFMQ-DM leaves them so",
    ),
    "sdnq_common": KeptSet(
        ("*time_embed*", "*context_embed*", "*condition_embed*", "*x_embedder*", "*t_embedder*", "*y_embedder*",
         "*proj_in", "*emb_in", "*txt_in", "*img_in", "*proj_out", "*norm_out*", "*final_layer*", "*patch_embed*"),
        "few weights at the ends of a network, where all other layers see their error: SDNQ skips them in every model",
    ),
    "modelopt_unet": KeptSet(
        ("*time_emb_proj", "*time_embedding*", "*conv_in", "*conv_out", "*conv_shortcut", "*add_embedding*",
         "*pos_embed*", "*time_text_embed*", "*context_embedder*", "*norm_out*", "*x_embedder*"),
        "embeddings, ends and shortcuts: NVIDIA's Model Optimizer skips them in diffusion models by default",
    ),
}
"""Name -> what other code leaves in full precision; `kept` takes them."""


def policy_rules(policy: Policy, widths: Widths, bins: int = 1) -> list[Rule]:
    """Return the ordered rules of `policy`; see `Policy.rules`."""
    weight = TensorSpec(widths.weight, policy.weight_symmetric, policy.granularity)
    edge_weight = _weight_at_the_ends(weight, widths.first_last)
    if not widths.quantizes_activations:
        at_the_ends = QuantSpec(edge_weight)
        return [*_at_both_ends(policy, at_the_ends, at_the_ends), Rule("*", QuantSpec(weight))]
    operand = TensorSpec(widths.activation, policy.activation_symmetric, bins=bins, dynamic=policy.dynamic)
    at_input, at_output = (operand, None) if policy.activation_site == "input" else (None, operand)
    softmax = TensorSpec(widths.softmax, True, bins=bins, dynamic=policy.dynamic) if policy.attention else None
    made = replace(operand, symmetric=operand.symmetric or policy.qkv_symmetric) if policy.attention else None
    edge, boundary = _at_the_ends(operand, widths)
    read = at_input and boundary
    of_first = QuantSpec(edge_weight, edge if policy.quantize_state else read, at_output)
    of_last = QuantSpec(edge_weight, read, edge if policy.quantize_output else None)
    rules = _at_both_ends(policy, of_first, of_last)
    if policy.attention:
        rules.append(Rule(OPERANDS, QuantSpec(weight, at_input, made, is_operand=True)))
    return [*rules, Rule("*", QuantSpec(weight, at_input, at_output, softmax, made))]


def _at_both_ends(policy: Policy, of_first: QuantSpec, of_last: QuantSpec) -> list[Rule]:
    """Return the rules of the first and last layers."""
    first = FIRST if policy.first is None else policy.first
    last = LAST if policy.last is None else policy.last
    return [Rule(pattern, spec) for patterns, spec in ((first, of_first), (last, of_last)) for pattern in patterns]


def _weight_at_the_ends(weight: TensorSpec, first_last_bits: int) -> TensorSpec:
    """Weights of the first and last layers: `first_last_bits` or more; at 8 bits they keep their whole range."""
    edge = replace(weight, bits=at_least(weight.bits, first_last_bits))
    return replace(edge, metric="minmax") if width_of(edge.bits) >= LAYER_BITS[1] else edge


def _at_the_ends(operand: TensorSpec, widths: Widths) -> tuple[TensorSpec, TensorSpec]:
    """Activations of the first and last layers, at one width: found as the others are, and as the boundary's are."""
    widest = widths.widest if isinstance(operand.bits, tuple) else operand.bits
    edge = replace(operand, bits=at_least(widest, widths.first_last))
    boundary = replace(edge, bits=at_least(edge.bits, widths.boundary))
    if width_of(boundary.bits) > LAYER_BITS[1]:
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
        if (known := KEPT_SETS.get(entry)) is None:
            rules.append(Rule(entry, None, "quantization.keep_fp"))
            continue
        present = [glob for glob in known.globs if any(fnmatchcase(name, glob) for name in names)]
        if not present:
            raise ConfigError(
                f"quantization.keep_fp=[{entry}]: the model has none of the layers {', '.join(known.globs)}; give "
                "globs of its own layers"
            )
        rules += [Rule(glob, None, f"quantization.keep_fp=[{entry}]: {known.why}") for glob in present]
    return rules


def segmented(rules: Sequence[Rule], parts: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """Return `rules` where the layers named in `parts` have a range for each part of their input channels.

    Weight and input of such a layer are both cut, and so is nothing that its rule leaves in full precision.
    """
    cut = []
    for name, segments in parts.items():
        rule = first_match(rules, name)
        if rule is not None and rule.spec is not None:
            weight, read = (_segmented(spec, segments) for spec in (rule.spec.weight, rule.spec.input))
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
            made.append(Rule(name, replace(rule.spec, output=_segmented(output, segments)), rule.reason))
    return [*made, *rules]


def _segmented(spec: TensorSpec | None, segments: tuple[int, ...] | None) -> TensorSpec | None:
    """`spec` with a range for each segment; None stays None, and dynamic ranges stay as they are."""
    if spec is None or spec.dynamic is not None:  # a dynamic range is narrow anyway
        return spec
    return replace(spec, granularity=segmented_as(spec.granularity, segments))
