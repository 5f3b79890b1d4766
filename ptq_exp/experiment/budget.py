"""What is known before anything is computed: that the experiment fits its model, and its bit operations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq_exp.calibration import check_bins, labelled, positions
from ptq_exp.errors import InfeasibleError, QuantizationError
from ptq_exp.experiment.policy import policy
from ptq_exp.experiment.reconstruct import blocks_of
from ptq_exp.experiment.run import Setup
from ptq_exp.quantization import Report, disabled, quantize_, transforms_of
from ptq_exp.quantization.cost.operands import operands_of
from ptq_exp.results.record import Results
from ptq_exp.settings.compose import build
from ptq_exp.settings.schema import FULL_PRECISION


def check_feasible(setup: Setup, results: Results) -> None:
    """End the run here if a later stage could not do what the settings ask of this model.

    Raises:
        PTQError: as the stages would: rules that match nothing, ranges that do not fit a layer, blocks that cannot be
            reconstructed, steps without calibration states.
        InfeasibleError: the quantized network would take more bit operations than `bits.min_bops_ratio` allows.
    """
    if setup.config.bits.name == FULL_PRECISION or setup.artifact is not None:
        return
    config = setup.config.calibration
    drawn = positions(build(config.distribution, "calibration.distribution"), config.n_samples, len(setup.grid),
                      setup.config.seed)  # fmt: skip
    check_bins(setup.time_bins, labelled(drawn, setup.grid, config.labels).step)
    report = planned_report(setup)
    if setup.config.bits.min_bops_ratio is not None:
        _check_budget(setup.config.bits.min_bops_ratio, report, results)


def planned_report(setup: Setup) -> Report:
    """The report that the quantized network will have; its blocks are found, too, where it is to be reconstructed.

    Raises:
        PTQError: see `check_feasible`.
    """
    example = tuple(part.to(setup.device) for part in setup.model.example_inputs())
    network = setup.model.twin().to(setup.device)
    with _silent():  # all of it is said again when it is done
        rules = policy(setup, network, example)
        for transform in transforms_of(setup.config.quantization.transforms):
            transform.install_(network, transform.find(network, example))
        report = quantize_(network, rules, example)
        _check_called(setup, network, report, example)
        if setup.config.reconstruction.active:
            blocks_of(setup, network, setup.model.denoiser.to(setup.device), example)
    return report


def _check_called(setup: Setup, network: nn.Module, report: Report, example: tuple[Tensor, ...]) -> None:
    """Raise QuantizationError for layers that are to be calibrated and that no evaluation at some times calls."""
    waiting = {row.name for row in report.rows if row.scope == "conv_linear" and not row.macs and row.activation_bits}
    if not waiting:
        return
    steps = torch.linspace(0, len(setup.grid) - 1, min(4, len(setup.grid))).long()
    x, _, *y = (part.expand(len(steps), *part.shape[1:]) for part in example)
    t = setup.grid.network_time(steps).to(x.device)
    with disabled(network):
        unused = sorted(waiting - operands_of(network, (x, t, *y)).called)
    if unused:
        raise QuantizationError(
            f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}: the network never calls them, so that there "
            "is nothing to calibrate them on: add their names to quantization.keep_fp"
        )


def _check_budget(wanted: float, report: Report, results: Results) -> None:
    """End the run where its budget is not met; results.json says by how much, as `budget`."""
    totals = report.totals
    ratio = totals["bops_reduction"]["conv_linear"]
    results.update("budget", budget={"bops": totals["bops"], "bops_ratio": ratio, "min_bops_ratio": wanted})
    if ratio < wanted:
        raise InfeasibleError(
            f"bits.min_bops_ratio={wanted:g} is not met: convolutions and linear layers take FP32 / {ratio:.2f} bit "
            "operations; choose lower bits"
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
