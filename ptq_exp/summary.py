"""The table that ends a run: real data, full precision, quantized."""

from __future__ import annotations

import pandas as pd

from ptq_exp.quantization import Report

_TITLES = {
    "is": "IS", "fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall",
    "fid_increase_units": "FID increase", "psnr": "PSNR dB", "eps_error": "eps error",
}  # fmt: skip


def summary(values: dict, report: Report | None) -> str:
    """The table that ends a run: real data, full precision, quantized."""
    spec, real = values["metric_spec"], values["real"]
    rows = {"real data": _columns(real), "FP32": _columns(values["fp32"])}
    lines = []
    if report is not None:
        rows[values["config"]["bits"]["name"].upper()] = _columns(values["metrics"])
        lines += [report.summary(), ""]
    table = pd.DataFrame({title: row for title, row in rows.items() if row}).T.reindex(columns=list(_TITLES.values()))
    if not table.empty:
        lines.append(table.dropna(axis=1, how="all").to_string(float_format="{:.4g}".format, na_rep="-"))
    lines.append(
        f"{spec['n_samples']} images, seed {spec['seed']}, extractor {spec['extractor']} ({spec['preprocessing']}), "
        f"reference {spec['reference']}"
    )
    if "half_split_fid" in real:
        lines[-1] += (
            ";\nFID increase over FP32 of the same seeds in units of the FID between two random halves of the real "
            f"data ({real['half_split_fid']:.4g})"
        )
    return "\n".join(lines)


def _columns(scores: dict[str, float]) -> dict[str, float]:
    return {title: scores[key] for key, title in _TITLES.items() if key in scores}
