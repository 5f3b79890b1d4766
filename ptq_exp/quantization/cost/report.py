"""What of a network is quantized: every multiplication with its bits, or with the reason why it stays FP.

What is counted, per sample and network evaluation:

* coverage: share of multiply-accumulates (MACs) whose two operands are both quantized;
* BOPs: sum of MACs * bits of one operand * bits of the other, an FP operand counting 32 (Wang et al. 2020,
  "Differentiable Joint Pruning and Quantization for Hardware Efficiency"), so that FP32 = MACs * 1024;
* both twice: convolutions and linear layers alone, as papers count, and everything, with attention products;
* what transforms compute at run time: part of MACs, coverage and BOPs, at widths of its own, and of the weight bytes,
  but not of the FP32 network that reductions compare with;
* weight bytes: bits / 8 per quantized weight, plus 4 bytes per scale and ceil(bits / 8) per zero point (none
  if symmetric); biases, norms and all other parameters 4 bytes each.

Activations that change their width between sampling steps make BOPs a question of how often each width is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import pandas as pd

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.cost.row import FP_BITS, HOW_OFTEN, Bits, Row

SCOPES = ("conv_linear", "everything")


@dataclass(frozen=True)
class Report:
    """All operations of a network, in module order, and the count of parameters outside them (norms).

    `shares`: of the network evaluations of one sample, the share at each candidate width of the activations; None
    where they have one width, or where it is not known yet. Without it a report with candidates has no totals.
    `not_counted`: operators that the network runs and whose multiplications, if any, stand in no row; with one of them
    the coverage of everything is not known (None in the totals).
    """

    rows: tuple[Row, ...]
    other_params: int
    shares: tuple[float, ...] | None = None
    not_counted: tuple[str, ...] = ()

    @cached_property
    def candidates(self) -> int:
        """Number of candidate widths of the activations; 1 = the same width at every step."""
        return max((len(bits) for row in self.rows for bits in row.candidates), default=1)

    def at(self, row: int) -> Report:
        """Return the report of evaluations at the `row`-th candidate widths.

        Raises:
            QuantizationError: there is no such candidate.
        """
        if not 0 <= row < self.candidates:
            raise QuantizationError(f"Report.at: row {row} is out of range, choose 0..{self.candidates - 1}")
        return replace(self, rows=tuple(operation.at(row) for operation in self.rows), shares=None)

    def mixed(self, shares: Sequence[float]) -> Report:
        """Return the report whose BOPs are the mean over evaluations, the i-th candidate's counting ``shares[i]``.

        Raises:
            QuantizationError: not one share per candidate, a negative one, or their sum is not 1.
        """
        shares = tuple(float(share) for share in shares)
        if len(shares) != self.candidates:
            raise QuantizationError(
                f"Report.mixed: found {len(shares)} shares, expected {self.candidates}, one per candidate width"
            )
        if not (all(share >= 0 for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)):
            raise QuantizationError(f"Report.mixed: shares {list(shares)} must be 0 or more and sum to 1")
        return replace(self, shares=shares)

    @cached_property
    def totals(self) -> dict:
        """Sums over the network.

        Keys: ``params``, ``weight_bytes``, ``fp32_bytes``, ``size_reduction``; where weights are quantized
        ``bits_per_weight``, of these alone, with their scales; where ranges follow the data ``dynamic_scales``, how
        many are found per sample and evaluation; and, each a dictionary with
        the keys ``conv_linear`` and ``everything``: ``macs``, ``coverage`` (0 to 1; None: not known), ``bops``,
        ``bops_fp32``, ``bops_reduction`` (how many times fewer BOPs than FP32).

        Raises:
            QuantizationError: activations have candidate widths and no shares are known.
        """
        if self.candidates > 1 and self.shares is None:
            raise QuantizationError(HOW_OFTEN)
        params = sum(row.params for row in self.rows) + self.other_params
        size = sum(row.weight_bytes for row in self.rows) + 4 * self.other_params
        totals = {"params": params, "weight_bytes": size, "fp32_bytes": 4 * params}
        totals["size_reduction"] = 4 * params / size if size else 1.0
        if quantized := sum(row.quantized_params for row in self.rows):
            totals["bits_per_weight"] = 8 * sum(row.quantized_bytes for row in self.rows) / quantized
        if dynamic := sum(row.dynamic_scales for row in self.rows):
            totals["dynamic_scales"] = dynamic
        scopes = [self._accounting(scope) for scope in SCOPES]
        return totals | {key: dict(zip(SCOPES, [s[key] for s in scopes], strict=True)) for key in scopes[0]}

    def to_dict(self) -> dict:
        """Return totals, rows and, where known, shares as plain numbers, strings, lists and dictionaries (JSON)."""
        layers = [row.plain for row in self.rows]
        shares = {} if self.shares is None else {"shares": list(self.shares)}
        not_counted = {"not_counted": list(self.not_counted)} if self.not_counted else {}
        return {"totals": self.totals, **shares, **not_counted, "layers": layers}

    def table(self) -> pd.DataFrame:
        """Return one line per operation, with its BOPs."""
        columns = [field.name for field in fields(Row) if field.name != "added"]
        return pd.DataFrame([{n: getattr(row, n) for n in columns} | {"bops": self._bops(row)} for row in self.rows])

    def summary(self) -> str:
        """Return a few lines: operations by type and bits, totals, then what stays FP and why."""
        total = self.totals
        lines = [f"{'operation':<18}{'count':>6}{'params':>12}{'MACs':>9}{'weight':>8}{'act.':>6}"]
        for (kind, width, act), rows in _grouped(self.rows).items():
            share = sum(r.macs for r in rows) / max(1, total["macs"]["everything"])
            lines.append(
                f"{kind:<18}{len(rows):>6}{sum(r.params for r in rows):>12,}{share:>9.2%} {width:>7} {act:>5}"
            )
        for scope, title in zip(SCOPES, ("conv + linear", "everything"), strict=True):
            lines.append(
                f"{title}: {total['macs'][scope] / 1e6:,.2f} M MACs, {_percent(total['coverage'][scope])} covered, "
                f"BOPs {total['bops'][scope] / 1e9:,.3f} G = FP32 / {total['bops_reduction'][scope]:.1f}"
            )
        if self.not_counted:
            lines.append(f"not counted, so that the coverage of everything is unknown: {', '.join(self.not_counted)}")
        if self.candidates > 1:
            lines.append(f"activation bits by share of evaluations: {self._mix()}")
        lines.append(
            f"weights: {total['weight_bytes'] / 1e6:.3f} MB of {total['fp32_bytes'] / 1e6:.3f} MB in FP32 "
            f"(/ {total['size_reduction']:.2f})"
        )
        if "dynamic_scales" in total:
            lines.append(f"activation ranges from the data: {total['dynamic_scales']:,} per sample and evaluation")
        kept: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason:
                kept.setdefault(row.reason, []).append(row.name)
        for reason, names in kept.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"stays FP, whole or in part: {len(names)} ({shown}): {reason}")
        return "\n".join(lines)

    def _accounting(self, scope: str) -> dict[str, float]:
        rows = [row for row in self.rows if scope in ("everything", row.scope)]
        macs, bops = sum(row.macs for row in rows), sum(self._bops(row) for row in rows)
        own = sum(row.macs for row in rows if row.added is None)
        known = scope != "everything" or not self.not_counted
        coverage = sum(row.macs for row in rows if row.covered) / macs if macs else 0.0
        return {
            "macs": macs,
            "coverage": coverage if known else None,
            "bops": bops,
            "bops_fp32": own * FP_BITS**2,
            "bops_reduction": own * FP_BITS**2 / bops if bops else 1.0,
        }

    def _bops(self, row: Row) -> float:
        """Bit operations of `row`: at its one width, or the mean over `shares`."""
        if not row.candidates or self.shares is None:
            return row.bops
        return sum(share * row.at(i).bops for i, share in enumerate(self.shares))

    def _mix(self) -> str:
        """Return the share of each candidate, called by its widths (rules may have given several)."""
        widths = {bits for row in self.rows for bits in row.candidates}
        return ", ".join(
            f"{_shown(tuple(sorted({bits[i] for bits in widths})))} in {share:.2%}"
            for i, share in enumerate(self.shares)
        )


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.2%}"


def _shown(bits: Bits) -> str:
    return "/".join(map(str, bits)) if isinstance(bits, tuple) else "FP" if bits is None else str(bits)


def _grouped(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        shown = row.weight_format or _shown(row.weight_bits), row.activation_format or _shown(row.activation_bits)
        groups.setdefault((row.type, *shown), []).append(row)
    return groups
