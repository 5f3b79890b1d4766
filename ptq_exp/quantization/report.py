"""What of a network is quantized: every multiplication with its bits, or with the reason why it stays FP.

Accounting, per sample:

* coverage: share of multiply-accumulates (MACs) whose two operands are both quantized;
* BOPs: sum of MACs * bits of one operand * bits of the other, an FP operand counting 32 (Wang et al. 2020,
  "Differentiable Joint Pruning and Quantization for Hardware Efficiency"), so that FP32 = MACs * 1024;
* both twice: convolutions and linear layers alone, as papers count, and everything, with attention products;
* weight bytes: bits / 8 per quantized weight, plus 4 bytes per scale and ceil(bits / 8) per zero point (none
  if symmetric); biases, norms and all other parameters 4 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import pandas as pd
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.calibrate import disabled, quantizers
from ptq_exp.quantization.layers import FULL_PRECISION, QUANTIZED, QuantAttention, attention_obstacle, bits_of
from ptq_exp.quantization.operations import Trace, multiplying_layers, trace
from ptq_exp.quantization.quantizer import WeightQuantizer

FP_BITS = 32
SCOPES = ("conv_linear", "everything")


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: module name; ``<attention>.qk`` and ``<attention>.av`` for the products q k^T and softmax(.) v;
            ``(other)`` for multiplications outside known modules.
        type: class of the full-precision module, ``Attention.qk``, ``Attention.av`` or ``(other)``.
        scope: ``conv_linear`` for layers, ``attention`` for products, ``other``.
        params: parameters of the module itself.
        macs: multiply-accumulates per sample; 0 for a layer that the example never called.
        weight_bits: bits of the weight; of k in q k^T, of v in softmax(.) v. None = FP.
        activation_bits: bits of the layer input; of q in q k^T, of the map in softmax(.) v. None = FP.
        weight_bytes: size of the module's parameters, with scales and zero points.
        reason: why an operand stays FP; empty if both are quantized.
    """

    name: str
    type: str
    scope: str
    params: int
    macs: int
    weight_bits: int | None
    activation_bits: int | None
    weight_bytes: float
    reason: str = ""

    @property
    def covered(self) -> bool:
        """Whether both operands are quantized."""
        return self.weight_bits is not None and self.activation_bits is not None

    @property
    def bops(self) -> int:
        """Bit operations per sample."""
        return self.macs * (self.weight_bits or FP_BITS) * (self.activation_bits or FP_BITS)


@dataclass(frozen=True)
class Report:
    """All operations of a network, in module order, and the count of parameters outside them (norms)."""

    rows: tuple[Row, ...]
    other_params: int

    @cached_property
    def totals(self) -> dict:
        """Sums over the network.

        Keys: ``params``, ``weight_bytes``, ``fp32_bytes``, ``size_reduction``; and, each a dictionary with
        the keys ``conv_linear`` and ``everything``: ``macs``, ``coverage`` (0 to 1), ``bops``, ``bops_fp32``,
        ``bops_reduction`` (how many times fewer BOPs than FP32).
        """
        params = sum(row.params for row in self.rows) + self.other_params
        size = sum(row.weight_bytes for row in self.rows) + 4 * self.other_params
        totals = {"params": params, "weight_bytes": size, "fp32_bytes": 4 * params}
        totals["size_reduction"] = 4 * params / size if size else 1.0
        scopes = [_accounting(self._in(scope)) for scope in SCOPES]
        return totals | {key: dict(zip(SCOPES, [s[key] for s in scopes], strict=True)) for key in scopes[0]}

    def to_dict(self) -> dict:
        """Return totals and rows as plain numbers, strings, lists and dictionaries (JSON)."""
        return {"totals": self.totals, "layers": [asdict(row) for row in self.rows]}

    def table(self) -> pd.DataFrame:
        """Return one line per operation, with its BOPs."""
        return pd.DataFrame([asdict(row) | {"bops": row.bops} for row in self.rows])

    def summary(self) -> str:
        """Return a few lines: operations by type and bits, totals, then what stays FP and why."""
        total = self.totals
        lines = [f"{'operation':<18}{'count':>6}{'params':>12}{'MACs':>9}{'weight':>8}{'act.':>6}"]
        for (kind, *bits), rows in _grouped(self.rows).items():
            share = sum(r.macs for r in rows) / max(1, total["macs"]["everything"])
            width, act = ("FP" if b is None else b for b in bits)
            lines.append(
                f"{kind:<18}{len(rows):>6}{sum(r.params for r in rows):>12,}{share:>9.2%}{width:>8}{act:>6}"
            )
        for scope, title in zip(SCOPES, ("conv + linear", "everything"), strict=True):
            lines.append(
                f"{title}: {total['macs'][scope] / 1e6:,.2f} M MACs, {total['coverage'][scope]:.2%} covered, "
                f"BOPs {total['bops'][scope] / 1e9:,.3f} G = FP32 / {total['bops_reduction'][scope]:.1f}"
            )
        lines.append(
            f"weights: {total['weight_bytes'] / 1e6:.3f} MB of {total['fp32_bytes'] / 1e6:.3f} MB in FP32 "
            f"(/ {total['size_reduction']:.2f})"
        )
        kept: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason:
                kept.setdefault(row.reason, []).append(row.name)
        for reason, names in kept.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"stays FP, whole or in part: {len(names)} ({shown}): {reason}")
        return "\n".join(lines)

    def _in(self, scope: str) -> list[Row]:
        return [row for row in self.rows if scope == "everything" or row.scope == scope]


def describe(model: nn.Module, example_inputs: tuple, reasons: Mapping[str, str] | None = None) -> Report:
    """Account for the operations of `model`, quantized or not, by one forward with all quantizers off.

    Args:
        model: any network.
        example_inputs: positional arguments of one sample (first dimension 1).
        reasons: module name -> why it stays FP, where that is known.

    Raises:
        QuantizationError: the example holds more than one sample.
    """
    with disabled(model):
        counted = trace(model, example_inputs)
    return build_report(model, counted, reasons or {})


def build_report(model: nn.Module, counted: Trace, reasons: Mapping[str, str]) -> Report:
    """Join the multiplications counted in full precision with the quantizers that `model` has now."""
    layers = dict(multiplying_layers(model))
    holders = dict(parameter_holders(model))
    rows: list[Row] = []
    for name, module in model.named_modules():
        if name in layers:
            rows.append(_layer_row(name, module, counted.layer_macs.get(name, 0), reasons))
        elif isinstance(module, Attention):
            rows += _attention_rows(name, module, counted.attention_macs[name], reasons)
        elif name in holders:
            reason = f"left alone: {_type_name(module)} has no quantized counterpart"
            rows.append(_fp_row(name, _type_name(module), _own_params(module), 0, reasons.get(name, reason)))
    if counted.other_macs:
        rows.append(
            _fp_row("(other)", "(other)", 0, counted.other_macs, "multiplied outside the modules above")
        )
    params = sum(p.numel() for p in model.parameters())
    return Report(tuple(rows), other_params=params - sum(row.params for row in rows))


def ranges(model: nn.Module) -> dict[str, dict]:
    """Return per quantizer its bits, symmetry, segments and ``[rows][segments]`` lists of its four buffers
    (JSON).

    Raises:
        QuantizationError: a quantizer is not calibrated.
    """
    found = {}
    for name, quantizer in quantizers(model):
        if not quantizer.ready:
            raise QuantizationError(f"{name}: not calibrated, it has no range to report")
        found[name] = {
            "bits": quantizer.bits,
            "symmetric": quantizer.symmetric,
            "segments": quantizer.segments,
        }
        for buffer in ("scale", "zero_point", "qmin", "qmax"):
            found[name][buffer] = getattr(quantizer, buffer).tolist()
    return found


def parameter_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the modules that own a matrix or kernel themselves (not norms, not biases)."""
    for name, module in model.named_modules():
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            yield name, module


def _accounting(rows: Iterable[Row]) -> dict[str, float]:
    rows = list(rows)
    macs, bops = sum(row.macs for row in rows), sum(row.bops for row in rows)
    return {
        "macs": macs,
        "coverage": sum(row.macs for row in rows if row.covered) / macs if macs else 0.0,
        "bops": bops,
        "bops_fp32": macs * FP_BITS**2,
        "bops_reduction": macs * FP_BITS**2 / bops if bops else 1.0,
    }


def _layer_row(name: str, layer: nn.Module, macs: int, reasons: Mapping[str, str]) -> Row:
    quantizer = getattr(layer, "weight_quantizer", None)
    bits = bits_of(quantizer), bits_of(getattr(layer, "input_quantizer", None))
    size = 4.0 * _own_params(layer)
    if isinstance(quantizer, WeightQuantizer):
        per_range = 4 if quantizer.symmetric else 4 + -(-quantizer.bits // 8)
        size += layer.weight.numel() * (quantizer.bits / 8 - 4) + quantizer.scale.numel() * per_range
    reason = "" if None not in bits else reasons.get(name) or _why_fp(layer, *bits)
    return Row(name, _type_name(layer), "conv_linear", _own_params(layer), macs, *bits, size, reason)


def _attention_rows(
    name: str, attention: Attention, macs: tuple[int, int], reasons: Mapping[str, str]
) -> list[Row]:
    """Return the rows of q k^T and softmax(.) v."""
    q, k, v, softmax = (None,) * 4
    obstacle = "" if type(attention) in (Attention, QuantAttention) else "a subclass of Attention"
    obstacle = obstacle or attention_obstacle(attention)
    if not obstacle:
        q, k, v = (
            bits_of(getattr(m, "output_quantizer", None))
            for m in (attention.to_q, attention.to_k, attention.to_v)
        )
        if type(attention.processor) is AttnProcessor:
            softmax = bits_of(getattr(attention, "softmax_quantizer", None))
    prefix = f"{name}." if name else ""
    rows = []
    for product, count, pair in (("qk", macs[0], (k, q)), ("av", macs[1], (v, softmax))):
        reason = reasons.get(name) or obstacle or "q, k, v or the softmax map has no quantizer"
        reason = "" if None not in pair else reason
        rows.append(
            Row(f"{prefix}{product}", f"Attention.{product}", "attention", 0, count, *pair, 0.0, reason)
        )
    return rows


def _fp_row(name: str, kind: str, params: int, macs: int, reason: str) -> Row:
    return Row(name, kind, "other", params, macs, None, None, 4.0 * params, reason)


def _why_fp(layer: nn.Module, weight_bits: int | None, activation_bits: int | None) -> str:
    if type(layer) not in QUANTIZED and type(layer) not in FULL_PRECISION:
        bases = [base.__name__ for base in QUANTIZED if isinstance(layer, base)]
        why = f"is a subclass of {bases[0]}" if bases else "has no quantized counterpart"
        return f"left alone: {_type_name(layer)} {why}"
    missing = [n for n, bits in (("weight", weight_bits), ("input", activation_bits)) if bits is None]
    return f"no quantizer on {' and '.join(missing)}"


def _type_name(module: nn.Module) -> str:
    return FULL_PRECISION.get(type(module), type(module)).__name__


def _own_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _grouped(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.type, row.weight_bits, row.activation_bits), []).append(row)
    return groups
