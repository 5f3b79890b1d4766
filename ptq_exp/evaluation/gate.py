"""Judge the scores of a run by bounds that were set for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ptq_exp.evaluation.scores import SCORES


def judged(scores: Mapping[str, float | None], gate: Mapping[str, float]) -> dict[str, Any]:
    """Compare scores with their bounds; a score that was not measured misses its bound.

    Args:
        scores: by name, as in `SCORES`, which say whether higher or lower is better.
        gate: bound of each score that counts; a score that equals it reaches it.

    Returns:
        {"passed": bool, "bounds": `gate`, "missed": {name: {"value", "bound", "by"}}}; null where nobody measured it.
    """
    missed = {}
    for name, bound in gate.items():
        value = scores.get(name)
        if value is None or math.isnan(value):
            missed[name] = {"value": None, "bound": bound, "by": None}
        elif SCORES[name].better * (value - bound) < 0:
            missed[name] = {"value": value, "bound": bound, "by": abs(value - bound)}
    return {"passed": not missed, "bounds": dict(gate), "missed": missed}


def gate_line(verdict: Mapping[str, Any]) -> str:
    """Say in one line what misses its bound and by how much; "" where nothing does."""
    parts = []
    for name, entry in verdict.get("missed", {}).items():
        if entry["value"] is None:
            parts.append(f"{name} was not measured")
        else:
            side = "below" if SCORES[name].better > 0 else "above"
            parts.append(f"{name} {entry['value']:.5g} is {entry['by']:.3g} {side} {entry['bound']:g}")
    return f"evaluation.gate missed: {', '.join(parts)}" if parts else ""
