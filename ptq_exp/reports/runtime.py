"""Times of a network on engines as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"


def markdown(found: Mapping[str, Any]) -> str:
    """Lay out what `python -m ptq_exp bench` measured: a row for each engine and number of threads.

    Args:
        found: {"network", "parameters", "batch", "rows": entries as `runtime` of results.json holds them}.
    """
    return "\n".join([*table([found]), "", *_notes(found["rows"], found["batch"])])


def table(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of several networks, ms per evaluation."""
    head = ["network", "params", "batch", "engine", "thr.", "torch FP32", "torch simulation", "engine f32",
            "engine bf16", "**int8**", "int8, rest bf16", "torch / int8", "f32 / int8", "bf16 / int8"]
    if with_memory := any("peak_bytes" in row for network in networks for row in network["rows"]):
        head += ["peak MB f32 / bf16 / int8", "int8 / f32"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * 2 + " --- |" + " ---: |" * (len(head) - 4)]
    for network in networks:
        for n, row in enumerate(network["rows"]):
            first = [network["network"], f"{network['parameters'] / 1e6:.1f} M", str(network["batch"])]
            lines.append("| " + " | ".join([*(first if n == 0 else ["", "", ""]), *_cells(row, with_memory)]) + " |")
    return lines


def _cells(row: Mapping[str, Any], with_memory: bool) -> list[str]:
    engine, ms, faster = row["engine"], row["ms_per_evaluation"], row["faster_than"]
    kinds = ("f32", "bf16", "int8", "int8_bf16")
    times = [_number(ms.get(name)) for name in ("torch_fp32", "simulation", *(f"{engine}_{kind}" for kind in kinds))]
    times[4] = f"**{times[4]}**"
    ratios = [_number(faster.get(name), 2) for name in ("torch_fp32", f"{engine}_f32", f"{engine}_bf16")]
    cells = [engine, str(row["threads"]), *times, *ratios]
    if with_memory:
        peak = row.get("peak_bytes", {})
        found = [peak.get(f"{engine}_{kind}") for kind in kinds[:3]]
        cells.append(" / ".join(_number(value and value / 1e6, 0) for value in found))
        cells.append(_number(found[2] / found[0], 2) if found[0] and found[2] else MISSING)
    return cells


def _notes(rows: Sequence[Mapping[str, Any]], batch: int) -> list[str]:
    """Say what else was found, a line for each engine."""
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        row = next(row for row in rows if row["engine"] == engine)
        attention = row["attention_int8_share"]
        parts = [f"{engine} {row['version']}", f"{row['int8_share']:.2%} of the MACs of its layers as int8"]
        parts += [] if attention is None else [f"{attention:.0%} of those of attention products"]
        parts += [f"files {row['file_bytes'] / 1e6:.1f} MB"] if row.get("file_bytes") else []
        parts += [f"8-bit sums {row['saturation']:.3f} of the right ones"] if row.get("saturation") is not None else []
        lines.append("; ".join(parts) + ".")
    return [f"ms per evaluation of the network for {batch} images, medians of {rows[0]['repeats']} turns.", *lines]


def _number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
