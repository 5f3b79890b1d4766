"""While ranges are found: those of weights, then those of activations, bin by bin."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet, check_bins
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import (
    ActivationQuantizer,
    Report,
    calibrate_weights_,
    calibrating,
    depending_on_alone,
    disabled,
    finish_calibration,
    of_samples,
    proven,
    quantizers,
    refuted,
    select_row,
)

log = logging.getLogger("ptq_exp")


def calibrate(run: Run, plan: Plan, network: nn.Module, report: Report, calibration_set: CalibrationSet) -> None:
    """Search the weight ranges, then those of the activations of the weight-quantized network.

    The states of a bin are observed while its row is in force, and searched before the next bin's: the memory that
    observations take does not grow with the number of bins.

    Raises:
        DataError: a bin has no states.
    """
    layers = sum(row.weight_bits is not None for row in report.rows if row.scope == "conv_linear")
    with run.progress(layers, "weight ranges") as bar:
        calibrate_weights_(network, plan.metric, bar.update)
    check_bins(plan.time_bins, torch.from_numpy(np.array(calibration_set.step)))
    if not any(q.needs_data for _, q in quantizers(network) if isinstance(q, ActivationQuantizer)):
        log.info("activation ranges: none is calibrated")
        finish_calibration(network, plan.metric)
        return
    of_time, others = _time_quantizers(run, plan, network)
    with run.progress(len(calibration_set), "calibration forward") as bar:
        for row, states in enumerate(states_of_bins(plan, network, calibration_set)):
            for batch in states.batches(plan.batch_size):
                _observe(run, network, [batch], others)
                bar.update(min(plan.batch_size, bar.total - bar.n))
            if of_time:
                _observe(run, network, batches_of_times(run, plan, row), of_time)
            finish_calibration(network, plan.metric)


def states_of_bins(plan: Plan, network: nn.Module, states: CalibrationSet) -> Iterator[CalibrationSet]:
    """Yield the states of each bin of sampling steps, while the bin's row of ranges is in force."""
    if plan.n_bins == 1:
        yield states
        return
    bin_of_state = plan.time_bins[torch.from_numpy(np.array(states.step))]
    for row in range(plan.n_bins):
        select_row(network, row)
        yield states.take((bin_of_state == row).nonzero().flatten().numpy())


@torch.no_grad()
def prove(run: Run, quantized: QuantizedModel, calibration_set: CalibrationSet) -> QuantizedModel:
    """Give the quantized model a report that one evaluation of calibration states bears out, and log the rest.

    See `proven`. With candidate widths every sample has another one, with bins of sampling steps the ranges of its own
    step.
    """
    network, n = quantized.network, max(2, len(quantized.widths))
    call = next(iter(calibration_set.batches(n)))
    rows = None
    if quantized.time_bins is not None:
        rows = quantized.time_bins[calibration_set.batch_steps(n)[: len(call.x)]]
    elif len(quantized.widths) > 1:
        rows = torch.arange(len(call.x)) % len(quantized.widths)
    with of_samples(network, rows):
        checked = proven(network, quantized.report, call.to(run.device))
    for row in refuted(quantized.report, checked):
        log.warning("%s is not covered: %s", row.name, row.reason)
    return replace(quantized, report=checked)


def _observe(run: Run, network: nn.Module, batches: Iterable[Call], chosen: Collection[str]) -> None:
    """Let the `chosen` quantizers see `batches`."""
    with calibrating(network, chosen), torch.no_grad():
        for call in batches:
            call.to(run.device).evaluate(network)


def _time_quantizers(run: Run, plan: Plan, network: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the quantizers of layers that depend on the time alone (none unless asked for); the others."""
    names = {name for name, quantizer in quantizers(network) if isinstance(quantizer, ActivationQuantizer)}
    if plan.quantization.time_layers != "all_steps":
        return set(), names
    layers = set(time_layers(run, network))
    of_time = {name for name in names if name.rpartition(".")[0] in layers}
    log.info(
        "quantization.time_layers: %d quantizers depend on the time alone and see all %d times",
        len(of_time), len(run.grid.timesteps.unique()),
    )
    return of_time, names - of_time


def time_layers(run: Run, network: nn.Module) -> list[str]:
    """Return the layers of `network` that depend on the time alone, in the order of their calls."""
    with disabled(network):
        return depending_on_alone(network, run.example(), 1)


def batches_of_times(run: Run, plan: Plan, row: int) -> Iterable[Call]:
    """All different network times of one bin, each once, with any state: the layers concerned do not see it."""
    times = run.grid.network_time((plan.time_bins == row).nonzero().flatten()).unique()
    for part in times.split(plan.batch_size):
        yield run.example().expanded(len(part))._replace(t=part)

