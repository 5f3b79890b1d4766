"""While ranges are found: those of weights, then those of activations, bin by bin."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet, check_bins
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.twin import Twin
from ptq_exp.quantization import (
    ActivationQuantizer,
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

Batch = tuple[Tensor, Tensor, Tensor | None]


def calibrate(setup: Setup, twin: Twin, calibration_set: CalibrationSet) -> None:
    """Search the weight ranges, then those of the activations of the weight-quantized network.

    The states of a bin are observed while its row is in force, and searched before the next bin's: the memory that
    observations take does not grow with the number of bins.

    Raises:
        DataError: a bin has no states.
    """
    config, quantized = setup.config, twin.network
    layers = sum(row.weight_bits is not None for row in twin.report.rows if row.scope == "conv_linear")
    with setup.progress(layers, "weight ranges") as bar:
        calibrate_weights_(quantized, config.metric.name, bar.update)
    bin_of_state = setup.time_bins[torch.from_numpy(np.array(calibration_set.step))]
    check_bins(setup.time_bins, torch.from_numpy(np.array(calibration_set.step)))
    of_time, others = _time_quantizers(setup, quantized)
    with setup.progress(len(calibration_set), "calibration forward") as bar:
        for row in range(setup.n_bins):
            states = calibration_set
            if setup.n_bins > 1:
                select_row(quantized, row)
                states = calibration_set.take((bin_of_state == row).nonzero().flatten().numpy())
            for batch in states.batches(config.calibration.batch_size):
                _observe(setup, quantized, [batch], others)
                bar.update(min(config.calibration.batch_size, bar.total - bar.n))
            if of_time:
                _observe(setup, quantized, batches_of_times(setup, row), of_time)
            finish_calibration(quantized, config.metric.name)


@torch.no_grad()
def prove(setup: Setup, twin: Twin, calibration_set: CalibrationSet) -> Twin:
    """The twin with a report that one evaluation of calibration states bears out, see `proven`; the rest is logged.

    With candidate widths every sample has another one, with bins of sampling steps the ranges of its own step.
    """
    network, n = twin.network, max(2, len(setup.activation_widths))
    x, t, y = next(iter(calibration_set.batches(n)))
    rows = None
    if setup.n_bins > 1:
        rows = setup.time_bins[calibration_set.batch_steps(n)[: len(x)]]
    elif len(setup.activation_widths) > 1:
        rows = torch.arange(len(x)) % len(setup.activation_widths)
    inputs = tuple(None if part is None else part.to(setup.device) for part in (x, t, y))
    with of_samples(network, rows):
        checked = proven(network, twin.report, inputs)
    for row in refuted(twin.report, checked):
        log.warning("%s is not covered: %s", row.name, row.reason)
    return replace(twin, report=checked)


def _observe(setup: Setup, network: nn.Module, batches: Iterable[Batch], chosen: Collection[str]) -> None:
    """Let the `chosen` quantizers see `batches`."""
    with calibrating(network, chosen), torch.no_grad():
        for x, t, y in batches:
            network(x.to(setup.device), t.to(setup.device), None if y is None else y.to(setup.device))


def _time_quantizers(setup: Setup, network: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the quantizers of layers that depend on the time alone (none unless asked for); the others."""
    names = {name for name, quantizer in quantizers(network) if isinstance(quantizer, ActivationQuantizer)}
    if setup.config.quantization.time_layers != "all_steps":
        return set(), names
    layers = set(time_layers(setup, network))
    of_time = {name for name in names if name.rpartition(".")[0] in layers}
    log.info(
        "quantization.time_layers: %d quantizers depend on the time alone and see all %d times",
        len(of_time), len(setup.grid.timesteps.unique()),
    )  # fmt: skip
    return of_time, names - of_time


def time_layers(setup: Setup, network: nn.Module) -> list[str]:
    """The layers of `network` that depend on the time alone, in the order of their calls."""
    with disabled(network):
        return depending_on_alone(network, _example(setup), 1)


def batches_of_times(setup: Setup, row: int) -> Iterable[Batch]:
    """All different network times of one bin, each once, with any state: the layers concerned do not see it."""
    times = setup.grid.network_time((setup.time_bins == row).nonzero().flatten()).unique()
    x, _, *y = _example(setup)
    for part in times.split(setup.config.calibration.batch_size):
        yield x.expand(len(part), *x.shape[1:]), part, y[0].expand(len(part)) if y else None


def _example(setup: Setup) -> tuple[Tensor, ...]:
    return tuple(part.to(setup.device) for part in setup.model.example_inputs())
