"""Bit-widths and number formats per group of layers, as a refinement of rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.specs import QuantSpec, Rule, first_match
from ptq_exp.quantization.widths import UNQUANTIZED, check_width

GROUP_BITS = re.compile(r"w(\d+)a(\d+)")


def group_bits(setting: str, bits: str) -> tuple[int | str, int | str]:
    """Return widths or number formats of weights and activations.

    "w4a8" is (4, 8), "w4a16" leaves activations as they are, "mxfp4" is that format for both, and "nvfp4:8" has one
    for each.

    Raises:
        ConfigError: it is something else; the message begins with `setting`.
    """
    given = str(bits) if isinstance(bits, str) else ""
    if found := GROUP_BITS.fullmatch(given):
        weight, activation = map(int, found.groups())
    elif not given or given.isdigit():
        raise ConfigError(f"{setting}={bits}: give a weight and an activation width, such as w4a8")
    else:
        weight, _, activation = given.partition(":")
        weight, activation = (int(part) if part.isdigit() else part for part in (weight, activation or weight))
    try:
        check_width(setting, weight)
        check_width(setting, activation, activation=True)
    except ConfigError as error:
        if isinstance(weight, int) and isinstance(activation, int):
            raise
        raise ConfigError(
            f"{setting}={bits}: give a weight and an activation width, such as w4a8, a number format such as mxfp4, or "
            f"one for each, such as nvfp4:8 ({error})"
        ) from error
    return weight, activation


def with_groups(
    rules: Sequence[Rule], groups: Mapping[str, tuple[str, int | str, int | str]], names: Collection[str],
    fixed: Collection[str],
) -> list[Rule]:
    """Return `rules` where groups of layers have widths of their own, for weights and for activations.

    Softmax maps and layers that a rule keeps in full precision stay as they are.

    Args:
        groups: setting -> (glob, weight bits, activation bits), widths or number formats; the first whose glob matches
            a layer decides.
        names: of the network's layers.
        fixed: globs of layers that no group changes: the first and the last ones.

    Raises:
        ConfigError: a glob matches none of the layers that can change, or those before it took them all; the message
            begins with the setting.
    """
    free = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in fixed)]
    made: dict[str, Rule] = {}
    for setting, (pattern, weight, activation) in groups.items():
        matched = [name for name in free if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern.strip("*"), free, n=3, cutoff=0.3) or free[:3]
            raise ConfigError(f"{setting}: {pattern!r} matches no layer between the first and the last ones; names "
                              f"near it: {', '.join(near)}")
        left = [name for name in matched if name not in made]
        if not left:
            raise ConfigError(f"{setting}: all layers that {pattern!r} matches are in groups before it: leave it out")
        for name in left:
            rule = first_match(rules, name)
            if rule is not None and rule.spec is not None:
                made[name] = replace(rule, pattern=name, spec=_at_widths(rule.spec, weight, activation))
    return [*made.values(), *rules]


def _at_widths(spec: QuantSpec, weight: int | str, activation: int | str) -> QuantSpec:
    if activation == UNQUANTIZED:
        return QuantSpec(spec.weight and replace(spec.weight, bits=weight))
    widths = {"weight": weight, "input": activation, "output": activation, "product": activation}
    changed = {role: getattr(spec, role) and replace(getattr(spec, role), bits=bits) for role, bits in widths.items()}
    return replace(spec, **changed)
