"""The section of a report on the engine that executed the quantized network, or was compared with the simulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq_exp.errors import DataError
from ptq_exp.reports.html.section import Section
from ptq_exp.reports.html.table import Table, number, text
from ptq_exp.storage.plain_json import read_json

FILE = "runtime.json"


def execution_section(results: Mapping[str, Any], folder: Path) -> Section | None:
    """Show times beside full precision and simulation, and layers by kernel; None where no engine was measured."""
    entry = results.get("runtime")
    if not entry:
        return None
    tables = [_times(entry)] if "ms_per_evaluation" in entry else []
    layers = _layers(folder / FILE)
    if layers:
        tables.append(_kernels(layers))
    folded = [(f"All {len(layers)} operations", _operations(layers))] if layers else []
    return Section("runtime", f"Executed by {entry['engine']}", text=[_said(entry)], tables=tables,
                   folded_tables=folded)


def _said(entry: Mapping[str, Any]) -> str:
    parts = [f"{entry['engine']} {entry['version']}, {entry['threads']} threads: {entry['int8_share']:.2%} of the MACs "
             "of convolutions and linear layers as 8-bit integers"]
    if entry.get("attention_int8_share") is not None:
        parts.append(f"{entry['attention_int8_share']:.0%} of those of attention products")
    if "eps_error" in entry:
        parts.append(f"noise estimates {entry['eps_error']:.2%} from the simulation's ({entry['states']} states)")
    if "psnr" in entry:
        parts.append(f"images {entry['psnr']:.1f} dB from the simulation's ({entry['images']} images)")
    if entry.get("file_bytes"):
        parts.append(f"files of {entry['file_bytes'] / 1e6:.2f} MB")
    if entry.get("saturation") is not None:
        parts.append(f"8-bit sums are {entry['saturation']:.3f} of the right ones on this processor")
    return "; ".join(parts) + "."


def _times(entry: Mapping[str, Any]) -> Table:
    peak, faster = entry.get("peak_bytes", {}), entry["faster_than"]
    mine = f"{entry['engine']}_int8"
    columns = [("", False), ("ms per evaluation", True), ("ms per image", True), ("time / int8", True)]
    rows = [
        [text(name.replace("_", " ")), number(ms), number(entry["ms_per_image"][name]),
         number(1.0 if name == mine else faster.get(name), "{:.2f}"),
         *([number(peak[name] / 1e6 if name in peak else None, "{:.0f}")] if peak else [])]
        for name, ms in entry["ms_per_evaluation"].items()
    ]
    note = f"Medians of {entry['repeats']} turns, {entry['batch_size']} images per evaluation."
    return Table([*columns, *([("peak MB", True)] if peak else [])], rows, "Times", sortable=False, note=note)


def _kernels(layers: Iterable[Mapping[str, Any]]) -> Table:
    """How many operations, and which share of the MACs, each kernel has."""
    counts: dict[tuple[str, str, str], list[int]] = {}
    for layer in layers:
        found = counts.setdefault((layer["executed"], layer["kernel"], layer["reason"]), [0, 0])
        found[0] += 1
        found[1] += layer["macs"]
    total = sum(macs for _, macs in counts.values()) or 1
    rows = [
        [text(executed), text(kernel or None), number(n, "{:.0f}"), number(100 * macs / total, "{:.2f}"), text(reason)]
        for (executed, kernel, reason), (n, macs) in sorted(counts.items(), key=lambda item: -item[1][1])
    ]
    columns = [("executed", False), ("kernel", False), ("operations", True), ("MACs %", True), ("reason", False)]
    return Table(columns, rows, "Operations by kernel")


def _operations(layers: Iterable[Mapping[str, Any]]) -> Table:
    columns = [("layer", False), ("kind", False), ("executed", False), ("kernel", False), ("MACs", True),
               ("reason", False)]
    rows = [
        [text(layer["layer"]), text(layer["kind"]), text(layer["executed"]), text(layer["kernel"] or None),
         number(layer["macs"], "{:.4g}"), text(layer["reason"])]
        for layer in layers
    ]
    return Table(columns, rows, "Operations")


def _layers(path: Path) -> list[Mapping[str, Any]]:
    try:
        return list(read_json(path)["layers"])
    except (DataError, KeyError, TypeError):
        return []  # removed since: the numbers stand in results.json
