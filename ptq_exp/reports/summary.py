"""The table that ends a run: real data, full precision, quantized."""

from __future__ import annotations

import pandas as pd

from ptq_exp.evaluation.scores import SUMMARY, shown


def summary(values: dict, operations: str | None) -> str:
    """Lay out the scores in `values` of results.json as text, below the table of `operations` (None: not quantized)."""
    spec, real, metrics = values["metric_spec"], values["real"], values["metrics"]
    rows = {"real data": _columns(real), "FP32": _columns(values["fp32"])}
    lines = []
    if operations is not None:
        rows[values["config"]["bits"]["name"].upper()] = _columns(metrics)
        lines += [operations, ""]
    headings = [score.heading for score in shown(SUMMARY).values()]
    table = pd.DataFrame({title: row for title, row in rows.items() if row}).T.reindex(columns=headings)
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
    if "fixed_pattern_share" in metrics:
        lines.append(_of_the_error(metrics, values["eps_error_samples"], values["fixed_pattern_share_independent"]))
    return "\n".join(lines)


def _of_the_error(metrics: dict[str, float], samples: int, independent: float) -> str:
    """Return what the mean eps error alone does not say; see the README, "What is measured"."""
    last = metrics.get("eps_error_without_last")
    return (
        ("" if last is None else f"eps error without the last step {last:.4g}; ")
        + f"fixed pattern {metrics['fixed_pattern_share']:.2f} of the error ({independent:.2f} = independent errors of "
        f"{samples} samples)"
    )


def _columns(scores: dict[str, float]) -> dict[str, float]:
    return {score.heading: scores[key] for key, score in shown(SUMMARY).items() if key in scores}
