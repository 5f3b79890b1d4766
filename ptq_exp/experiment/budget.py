"""What is known before anything is computed: that the experiment fits its model, and its bit operations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptq_exp.calibration import check_bins
from ptq_exp.diffusion import Call, TimeGrid
from ptq_exp.errors import InfeasibleError, QuantizationError
from ptq_exp.experiment.plan import Plan, drawn_states
from ptq_exp.experiment.policy import policy
from ptq_exp.experiment.reconstruct import blocks_of
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Made, Record
from ptq_exp.quantization import Report, disabled, quantize_, transforms_of
from ptq_exp.quantization.cost.operands import operands_of
from ptq_exp.settings.schema import ExperimentConfig, ReconstructionConfig


def check_feasible(run: Run, plan: Plan, config: ExperimentConfig) -> Made:
    """Raise the error of a later stage that could not do what the settings ask of this model; find the bit operations.

    Returns:
        The report that the quantized network will have. Its record holds the budget, where there is one.

    Raises:
        PTQError: as the stages would: rules that match nothing, ranges that do not fit a layer, blocks that cannot be
            reconstructed, steps without calibration states.
    """
    if config.calibration.source is not None:
        check_bins(plan.time_bins, drawn_states(config.calibration, run.grid, run.seed).step)
    report = planned_report(run, plan, config.reconstruction)
    return Made(report, Record(_budget(plan.bits.min_bops_ratio, report)))


def planned_report(run: Run, plan: Plan, reconstruction: ReconstructionConfig) -> Report:
    """Find the report that the quantized network will have, and its blocks where it is to be reconstructed.

    Raises:
        PTQError: see `check_feasible`.
    """
    network, report = planned_network(run, plan)
    with _silent():  # all of it is said again when it is done
        _check_called(run.grid, network, report, run.example())
        if reconstruction.active:
            blocks_of(run, plan, reconstruction, network, run.model.denoiser.to(run.device))
    return report


def planned_network(run: Run, plan: Plan, look: Callable[..., object] = lambda *of: None) -> tuple[nn.Module, Report]:
    """Place transforms and quantizers on a copy of the network, neither fitted nor calibrated; returns its report, too.

    Args:
        look: called with the network, each transform before it is placed, its sites and the rules.

    Raises:
        PTQError: as the stages would.
    """
    example, network = run.example(), run.network_copy()
    with _silent():
        rules = policy(plan, run.model, network, example)
        for transform in transforms_of(plan.quantization.transforms):
            sites = transform.chosen(transform.find(network, example), rules)
            look(network, transform, sites, rules)
            transform.install_(network, sites)
        return network, quantize_(network, rules, example)


def check_budget(wanted: float | None, report: Report) -> None:
    """Raise InfeasibleError if the network takes more bit operations than FP32 / `wanted`."""
    if wanted is None:
        return
    ratio = report.totals["bops_reduction"]["conv_linear"]
    if ratio < wanted:
        raise InfeasibleError(
            f"bits.min_bops_ratio={wanted:g} is not met: convolutions and linear layers take FP32 / {ratio:.2f} bit "
            "operations; choose lower bits"
        )


def _budget(wanted: float | None, report: Report) -> dict[str, Any]:
    if wanted is None:
        return {}
    totals = report.totals
    ratio = totals["bops_reduction"]["conv_linear"]
    return {"budget": {"bops": totals["bops"], "bops_ratio": ratio, "min_bops_ratio": wanted}}


def _check_called(grid: TimeGrid, network: nn.Module, report: Report, example: Call) -> None:
    """Raise QuantizationError for layers that are to be calibrated and that no evaluation at some times calls."""
    waiting = {row.name for row in report.rows if row.scope == "conv_linear" and not row.macs and row.activation_bits}
    if not waiting:
        return
    steps = torch.linspace(0, len(grid) - 1, min(4, len(grid))).long()
    calls = example.expanded(len(steps))._replace(t=grid.network_time(steps).to(example.x.device))
    with disabled(network):
        unused = sorted(waiting - operands_of(network, calls).called)
    if unused:
        raise QuantizationError(
            f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}: the network never calls them, so that there "
            "is nothing to calibrate them on: add their names to quantization.keep_fp"
        )


@contextmanager
def _silent() -> Iterator[None]:
    log = logging.getLogger("ptq_exp")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
