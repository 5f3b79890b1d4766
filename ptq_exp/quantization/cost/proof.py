"""Prove a report: one evaluation of the calibrated network, in which every quantized operand is looked at."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.cost.operands import Operands, Products, operands_of
from ptq_exp.quantization.cost.report import Report
from ptq_exp.quantization.cost.row import Row
from ptq_exp.quantization.quantizer.time_step import step_of
from ptq_exp.quantization.trace.products import product_site


def proven(model: nn.Module, report: Report, inputs: tuple) -> Report:
    """Return `report` without the coverage that an evaluation of `model` on `inputs` does not bear out.

    Where it really multiplies, both operands of each covered row must come from quantizers and lie on their grids, to
    the rounding of their type. A row whose operands do not is no longer covered, and its reason says why. Nothing of
    `model` and no random state changes.

    Args:
        model: quantized and calibrated; with several rows of ranges one is in force, or one for each sample
            (`of_samples`).
        report: of `quantize_`, or of `describe`.
        inputs: positional arguments of one evaluation, of any number of samples.

    Raises:
        QuantizationError: `model` has several rows of ranges, and none is in force.
    """
    step = step_of(model)
    if step is not None and not step.is_set:
        raise QuantizationError("proven: no row of ranges is in force: call select_row(model, row) first")
    seen = operands_of(model, inputs, values=True)
    uncounted = [row.name for row in report.rows if row.scope == "conv_linear" and not row.macs]
    late = [f"{name} (not called by the example)" for name in uncounted if name in seen.called]
    rows = tuple(_checked(row, seen) for row in report.rows)
    return replace(report, rows=rows, not_counted=tuple(dict.fromkeys((*report.not_counted, *late))))


def refuted(report: Report, checked: Report) -> list[Row]:
    """Return the rows of `checked`, which `proven` made of `report`, that are no longer covered."""
    return [new for old, new in zip(report.rows, checked.rows, strict=True) if old.covered and not new.covered]


def _checked(row: Row, seen: Operands) -> Row:
    """`row`, with an operand in full precision where the evaluation shows one."""
    if not row.covered:
        return row
    if row.scope == "conv_linear":
        products, called = seen.layers.get(row.name, []), row.name in seen.called
    else:
        name, _, product = row.name.rpartition(".")
        site = product_site(name, product)
        products = seen.products.get(site) or seen.attention.get(name, [])[product == "av" :: 2]
        called = bool(products)
    if not products:
        if not row.macs and not called:
            return row
        reason = "its multiplication was not seen in the proof"
        return replace(row, weight_bits=None, activation_bits=None, reason=reason)
    activation, weight = _faults(products, 0), _faults(products, 1)
    said = [f"{which} {fault}" for which, fault in (("weight", weight), ("activation", activation)) if fault]
    return replace(
        row, weight_bits=None if weight else row.weight_bits,
        activation_bits=None if activation else row.activation_bits, reason="; ".join(said),
    )


def _faults(products: Products, number: int) -> str:
    """Return what is wrong with operand `number` of `products`; "" if all of them lie on grids."""
    operands = [pair[number] for pair in products]
    if any(operand.quantizer is None for operand in operands):
        return "does not come from a quantizer"
    if off := sum(operand.off_grid for operand in operands):
        return f"does not lie on the grid of its range ({off} elements)"
    return ""
