"""From the settings of `quantization` and `bits` to ordered rules, with what has to be found in the network first."""

from __future__ import annotations

import logging
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from ptq_exp.diffusion import Call, DiffusionModel
from ptq_exp.experiment.plan import Plan
from ptq_exp.quantization import (
    Rule,
    TensorSpec,
    Widths,
    find_chunks,
    find_concats,
    kept,
    multipliers,
    segmented,
    with_groups,
    with_outputs,
)
from ptq_exp.quantization.layers import QUANTIZED
from ptq_exp.quantization.rules import OPERANDS

log = logging.getLogger("ptq_exp")


def policy(plan: Plan, model: DiffusionModel, network: nn.Module, example: Call) -> list[Rule]:
    """Make the ordered rules for `network`, the model's in full precision, with the model's own first and last layers.

    `example`: one sample for the forward that finds concatenations and split embeddings.
    """
    quantization, bits = plan.quantization, plan.bits
    first, last = ends(plan, model)
    names = [name for name, module in network.named_modules() if type(module) in QUANTIZED]
    operands = any(fnmatchcase(name, OPERANDS) for name, _ in network.named_modules())
    found = multipliers(network, example) if quantization.attention and (plan.groups or not operands) else []
    names += [name for name in found if name not in names]
    of_network = replace(quantization, attention=quantization.attention and (operands or bool(found)),
                         first=first, last=last)
    activation = plan.widths[0] if len(plan.widths) == 1 else tuple(plan.widths)
    widths = Widths(bits.weight, activation, bits.softmax, bits.first_last, bits.boundary)
    rules = kept(quantization.keep_fp, names) + of_network.rules(widths, plan.n_bins)
    if not operands:  # a rule that matches nothing is an error, but not this one
        rules = [rule for rule in rules if rule.pattern != OPERANDS]
    if quantization.shortcut != "joint":
        parts = find_concats(network, example, through_maps=quantization.shortcut == "split_all")
        _say("quantization.shortcut", f"{len(parts)} layers read concatenations, with a range for each part", parts)
        rules = segmented(rules, parts)
    if quantization.time_embedding != "none" and widths.quantizes_activations:
        parts = find_chunks(network, example)
        split = quantization.time_embedding == "split"
        each = "a range for each piece" if split else "one range for all pieces"
        _say("quantization.time_embedding", f"{len(parts)} embedding projections are cut into pieces, {each}", parts)
        output = TensorSpec(widths.activation, quantization.activation_symmetric, bins=plan.n_bins,
                            dynamic=quantization.dynamic)
        rules = with_outputs(rules, parts if split else dict.fromkeys(parts), output)
    if plan.groups:
        rules = with_groups(rules, plan.groups, names, [*first, *last])
    return rules


def ends(plan: Plan, model: DiffusionModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the globs of the first and of the last layers: those of the settings, or the model's own."""
    first, last = plan.quantization.first, plan.quantization.last
    return model.first_layers if first is None else first, model.last_layers if last is None else last


def _say(setting: str, what: str, found: dict) -> None:
    """Log what was found; a warning where the model has none of it, as the setting then changes nothing."""
    if found:
        log.info("%s: %s", setting, what)
    else:
        log.warning("%s changes nothing here: the model has no such layer", setting)
