"""What bits=auto chose: the solutions that were measured, and the bits of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_exp.reports.html.section import Section
from ptq_exp.reports.html.table import Table, number, text

_HEADINGS = {"size_mb": "MB", "bops_ratio": "FP32 BOPs / BOPs", "latency_ms": "ms"}


def allocation_section(results: Mapping[str, Any]) -> Section | None:
    """Return the table of solutions, and that of layers; None for a run whose bits were given."""
    found = results.get("allocation")
    if not found:
        return None
    budget = ", ".join(f"{_HEADINGS.get(name, name)} {value:g}" for name, value in found["budget"].items())
    sentence = (
        f"Each of {found['groups']} groups of layers has one of {', '.join(found['candidates'])}, within the budget "
        f"({budget}). Predicted: the eps error if the errors of the groups, each measured alone, were independent. "
        "Measured: how far the final states of whole trajectories are from those of full precision, relative, "
        "geometric mean over trajectories; the least decided."
    )
    return Section("allocation", "Bits of each layer", text=[sentence], tables=[_solutions(found)],
                   folded_tables=[(f"All {len(found['layers'])} layers", _layers(found))])


def _solutions(found: Mapping[str, Any]) -> Table:
    budgets = list(found["budget"])
    columns = [("groups with", False), *((_HEADINGS.get(name, name), True) for name in budgets),
               ("predicted eps error", True), ("measured final error", True), ("", False)]
    rows = [
        [
            text(f"{one['uniform']} everywhere" if one["uniform"] else _shown(one["counts"])),
            *(number(one[name]) for name in budgets), number(one["predicted_eps_error"], "{:.3%}"),
            number(one["final_error"], "{:.3%}"), text("chosen" if one["chosen"] else ""),
        ]
        for one in found["solutions"]
    ]
    return Table(columns, rows, "Solutions that were measured")


def _layers(found: Mapping[str, Any]) -> Table:
    rows = [
        [text(name), text(group["bits"]), number(group["eps_error"], "{:.3%}"), number(n, "{:.0f}")]
        for n, group in enumerate(found["chosen"]) for name in group["layers"]
    ]
    columns = [("layer", False), ("bits", False), ("eps error alone", True), ("group", True)]
    note = "Layers of one group read the same tensor; the error is that of the whole group alone."
    return Table(columns, rows, "Bits of each layer", note=note)


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{bits}: {n}" for bits, n in counts.items())
