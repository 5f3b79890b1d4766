"""The stage that decides the activation width of each sampling step."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ptq_exp.correction import (
    BitSchedule,
    Merged,
    budget_rows,
    forward_snr,
    gains,
    mean_square_error,
    measured_steps,
    relative_error,
    snr_rows,
)
from ptq_exp.deploy.artifact import SCHEDULE_FILE
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.noise import fit, measured, noise_of_widths
from ptq_exp.experiment.plan import Plan, given_schedule
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, Made, Record
from ptq_exp.lightning import PropagationModule
from ptq_exp.reports import figures
from ptq_exp.reports.curves import write_figure
from ptq_exp.settings.schema import RULES, BitsConfig, CorrectionConfig

log = logging.getLogger("ptq_exp")


def schedule_bits(run: Run, plan: Plan, config: CorrectionConfig, key: Key, quantized: QuantizedModel) -> Made:
    """Decide the activation width of each step, where `bits.schedule` asks for that.

    Args:
        config: how noise is measured and corrected.
        key: of the quantized network, see `Keys.quantization`.
    """
    bits, widths = plan.bits, plan.widths
    if bits.schedule is None:
        return Made(quantized, Record())
    snr = None
    if bits.schedule in RULES:
        rows, snr = _rule_rows(run, plan, config, key, quantized)
        activation = tuple(widths[row] for row in rows.tolist())
        schedule = BitSchedule(bits.weight, activation, tuple(run.grid.timesteps.tolist()), bits.schedule)
    else:
        schedule = given_schedule(bits, run.grid)
    shares = schedule.shares(widths)
    log.info(
        "bit schedule: %s", ", ".join(f"{s:.0%} of the steps at {b} bits" for b, s in zip(widths, shares, strict=True))
    )
    report = quantized.report.mixed(shares) if len(widths) > 1 else quantized.report
    scheduled = replace(quantized, schedule=schedule, report=report)
    return Made(scheduled, schedule_record(scheduled, bits.name, snr))


def schedule_record(
    quantized: QuantizedModel, bits_name: str, output_snr: dict[int, list[float]] | None = None
) -> Record:
    """Describe the bit schedule of a quantized model, as numbers, file and picture; empty without one.

    Args:
        output_snr: {width: [S]} signal-to-noise ratio of the estimates, where it was measured.
    """
    schedule, grid = quantized.schedule, quantized.grid
    if schedule is None:
        return Record()
    numbers = {
        "rule": schedule.rule,
        "activation": list(schedule.activation),
        "shares": dict(zip(map(str, schedule.widths), schedule.shares(schedule.widths), strict=True)),
    }
    draw = {"bit_schedule.png": lambda path: write_figure(path, figures.bit_schedule(
        schedule.activation, output_snr=output_snr or {}, forward_snr=forward_snr(grid).tolist(),
        title=title_of(quantized, bits_name),
    ))}
    return Record({"bit_schedule": numbers}, {SCHEDULE_FILE: schedule.save}, draw)


def title_of(quantized: QuantizedModel, bits_name: str) -> str:
    """Title of the pictures of a quantized model."""
    grid = quantized.grid
    return f"{quantized.model.name}, {bits_name}, {len(grid)} steps, eta {grid.eta:g}"


def _rule_rows(
    run: Run, plan: Plan, config: CorrectionConfig, key: Key, quantized: QuantizedModel
) -> tuple[Tensor, dict[int, list[float]]]:
    """Return the row of each step by the rule `bits.schedule`, and the SNR of the estimates at each width."""
    grid, widths = run.grid, plan.widths
    same = grid.first_with_time
    noise = [Merged(chunks, same) for chunks in noise_of_widths(run, config, key, quantized)]
    output_snr = torch.stack([relative_error(chunks, len(grid))[same] for chunks in noise], 1) ** -2
    shown = {width: output_snr[:, row].tolist() for row, width in enumerate(widths)}
    if plan.bits.schedule == "snr":
        return snr_rows(output_snr, forward_snr(grid)), shown
    errors = []
    for chunks in noise:
        statistics = fit(run, config, chunks) if config.active else None
        errors.append(mean_square_error(chunks, len(grid), statistics)[same])
    damage = _gains(run, plan.bits, config.batch_size, key, quantized).view(-1, 1) * torch.stack(errors, 1)
    rows = budget_rows(damage, *_bit_operations(plan, quantized, len(grid)), same)
    totals = ", ".join(f"{float(damage[:, row].sum()):.3g} at {width} bits" for row, width in enumerate(widths))
    chosen = float(damage.gather(1, rows.view(-1, 1)).sum())
    log.info("squared error of a typical final state, expected: %.3g (with one width in all steps: %s)", chosen, totals)
    return rows, shown


def _bit_operations(plan: Plan, quantized: QuantizedModel, steps: int) -> tuple[list[int], float]:
    """Cost of one evaluation at each width, and the budget of a whole trajectory; convolutions and linear layers.

    Raises:
        ConfigError: the budget is below the cost of the lowest width.
    """
    bits, widths = plan.bits, plan.widths
    totals = [quantized.report.at(row).totals for row in range(len(widths))]
    cost = [total["bops"]["conv_linear"] for total in totals]
    full = totals[0]["bops_fp32"]["conv_linear"]
    if full / bits.bops_ratio < min(cost):
        raise ConfigError(
            f"bits.bops_ratio={bits.bops_ratio}: at {widths[0]} bits in all steps the ratio is {full / min(cost):.1f}; "
            f"choose {full / max(cost):.1f} to {full / min(cost):.1f}, or add a lower width to bits.candidates={widths}"
        )
    return cost, steps * full / bits.bops_ratio


def _gains(run: Run, bits: BitsConfig, batch_size: int, key: Key, quantized: QuantizedModel) -> Tensor:
    """Squared error of a typical final state per squared error of eps in each step, [S]."""
    grid, n = run.grid, bits.gain_samples
    steps = measured_steps(len(grid), bits.gain_steps)
    module = PropagationModule(run.model, run.full_precision, quantized.at_row(0), grid, steps, seed=run.seed)
    key = {**key, "steps": steps}
    found = measured(run, "propagation of errors", module, n, min(n, batch_size), key)
    cause, effect = (torch.from_numpy(np.array(found[name])) for name in module.names)
    return gains(cause, effect, steps, len(grid))
