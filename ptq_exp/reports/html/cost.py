"""Coverage, bit operations and size, from quantization.json of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_exp.reports.html.section import Section
from ptq_exp.reports.html.table import Table, number, text
from ptq_exp.storage.plain_json import read_json

FP_BITS = 32


def cost_section(folder: Path) -> Section | None:
    """Return what is quantized, what it saves, and each operation; None without quantization.json."""
    path = folder / "quantization.json"
    if not path.is_file():
        return None
    report = read_json(path)
    totals, layers = report["totals"], report["layers"]
    shares = report.get("shares") or [1.0]
    size = (f"Weights take {totals['weight_bytes'] / 1e6:.3f} MB of {totals['fp32_bytes'] / 1e6:.3f} MB in FP32 "
            f"(/ {totals['size_reduction']:.2f}).")
    if bits := totals.get("bits_per_weight"):
        size += f" Quantized weights take {bits:.2f} bits each, with their scales."
    if not_counted := report.get("not_counted"):
        size += f" Not counted, so that the coverage of everything is unknown: {', '.join(not_counted)}."
    return Section(
        "cost", "Coverage and bit operations", text=[size], tables=[_totals(totals), _kinds(layers, totals)],
        folded_tables=[(f"All {len(layers)} operations", _operations(layers, shares))],
    )


def layer_bops(layer: Mapping[str, Any], shares: Sequence[float]) -> float:
    """Bit operations of one operation: MACs * bits * bits, the mean over candidate widths by their `shares`."""
    weight, activation = layer.get("added") or (FP_BITS, FP_BITS)
    bits = ((_at(layer["weight_bits"], i, weight), _at(layer["activation_bits"], i, activation))
            for i in range(len(shares)))
    return sum(share * layer["macs"] * own * other for share, (own, other) in zip(shares, bits, strict=True))


def _at(bits: int | Sequence[int] | None, candidate: int, full: int) -> int:
    if isinstance(bits, Sequence):
        return bits[candidate]
    return full if bits is None else bits


def _totals(totals: Mapping[str, Any]) -> Table:
    columns = [("", False), ("MACs, M", True), ("coverage", True), ("BOPs, G", True), ("FP32 BOPs, G", True),
               ("fewer", True)]
    rows = [
        [
            text(title), number(totals["macs"][scope] / 1e6), number(totals["coverage"][scope], "{:.2%}"),
            number(totals["bops"][scope] / 1e9), number(totals["bops_fp32"][scope] / 1e9),
            number(totals["bops_reduction"][scope], "{:.1f} times"),
        ]
        for scope, title in (("conv_linear", "conv + linear"), ("everything", "everything"))
    ]
    note = (
        "Of one network evaluation of one sample. Coverage: share of multiply-accumulates (MACs) whose two operands "
        "are quantized. BOPs: MACs times the bits of both operands, an operand in full precision counting 32. What "
        "transforms compute at run time counts at 16 bits (the signs of a rotation: 1), and not in the FP32 BOPs."
    )
    return Table(columns, rows, "Totals", sortable=False, note=note)


def _kinds(layers: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> Table:
    """One row per type of operation and bits."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for layer in layers:
        key = layer["type"], _width(layer, "weight"), _width(layer, "activation")
        groups.setdefault(key, []).append(layer)
    everything = max(1, totals["macs"]["everything"])
    rows = [
        [
            text(kind), number(len(found), "{:.0f}"), number(sum(layer["params"] for layer in found), "{:,.0f}"),
            number(sum(layer["macs"] for layer in found) / everything, "{:.2%}"), text(weight), text(activation),
        ]
        for (kind, weight, activation), found in groups.items()
    ]
    columns = [("operation", False), ("count", True), ("parameters", True), ("MACs", True), ("weight bits", False),
               ("activation bits", False)]
    return Table(columns, rows, "Operations by type")


def _operations(layers: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> Table:
    rows = [
        [
            text(layer["name"]), text(layer["type"]), number(layer["params"], "{:,.0f}"),
            number(layer["macs"] / 1e6), text(_width(layer, "weight")), text(_width(layer, "activation")),
            number(layer_bops(layer, shares) / 1e6), text(layer["reason"] or None),
        ]
        for layer in layers
    ]
    columns = [("name", False), ("operation", False), ("parameters", True), ("MACs, M", True), ("weight bits", False),
               ("activation bits", False), ("BOPs, M", True), ("why in full precision", False)]
    return Table(columns, rows, "All operations")


def _width(layer: Mapping[str, Any], operand: str) -> str:
    """Return the number format of an operand, or its width."""
    if made := layer.get(f"{operand}_format"):
        return made
    bits = layer[f"{operand}_bits"]
    if isinstance(bits, Sequence):
        return "/".join(map(str, bits))
    return "FP" if bits is None else str(bits)
