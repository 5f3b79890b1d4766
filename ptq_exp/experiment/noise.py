"""The noise of a quantized network, measured on trajectories: for its bit schedule and correction, and on others."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.correction import (
    Merged,
    MomentChunks,
    NoiseStatistics,
    fit_moments,
    fixed_pattern_share,
    relative_error,
    step_correlation,
)
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion.noise import CALIBRATION, EVALUATION
from ptq_exp.experiment.keys import versioned
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Arrays, Key, cached
from ptq_exp.lightning import NoiseModule, PropagationModule, measure
from ptq_exp.settings.schema import CorrectionConfig, EvaluationConfig

log = logging.getLogger("ptq_exp")


class EpsError(NamedTuple):
    """What is left on trajectories that no statistics were fitted on.

    Attributes:
        before, after: relative eps error of each step without and with the correction, [S].
        share_before, share_after: of a fixed pattern in these errors, [S]; see `fixed_pattern_share`.
        samples: trajectories that they were measured on.
        histogram: of the standardised residuals, [S, bins]; None without a correction.
        step_correlation: of residuals of consecutive steps, [S - 1]; None without a correction.
    """

    before: Tensor
    after: Tensor
    share_before: Tensor
    share_after: Tensor
    samples: int
    histogram: np.ndarray | None = None
    step_correlation: Tensor | None = None

    @property
    def corrected(self) -> bool:
        """Whether there is a correction, so that before and after differ."""
        return self.histogram is not None


def eps_error(run: Run, config: EvaluationConfig, key: Key, quantized: QuantizedModel) -> EpsError:
    """Measure the relative eps error of each step, before and after the correction, on full-precision trajectories.

    They are the first ones of the seed.

    Args:
        key: of the noise estimates, see `Keys.estimates`.
    """
    (n, batch_size), steps = _eps_error_samples(config), len(run.grid)
    module = NoiseModule(
        run.model, run.full_precision, [quantized.uncorrected], run.grid, seed=run.seed, stream=EVALUATION,
        statistics=quantized.statistics, summed=n,
    )
    found = measured(run, "eps error", module, n, batch_size, {**key, "stream": EVALUATION})
    chunks = MomentChunks(found["moments"])
    sums = [torch.from_numpy(np.array(found[name])) for name in module.totals]
    both = (None, quantized.statistics)
    errors = [relative_error(chunks, steps, statistics) for statistics in both]
    errors += [fixed_pattern_share(sums[0], n, chunks, steps, statistics, sums[-1]) for statistics in both]
    if quantized.statistics is None:
        return EpsError(*errors, n)
    correlation = step_correlation(torch.from_numpy(np.array(found["products"])))
    _say(errors[1] / errors[0] - 1, correlation)
    return EpsError(*errors, n, np.asarray(found["histogram"]).sum(0), correlation)


def eps_error_key(config: EvaluationConfig, key: Key, corrected: bool) -> Key:
    """Return what identifies the measurement of `eps_error`, of kind "noise"."""
    names, totals = NoiseModule.arrays(corrected, summed=True)
    return _key("noise", {**key, "stream": EVALUATION}, *_eps_error_samples(config), [*names, *totals])


def _eps_error_samples(config: EvaluationConfig) -> tuple[int, int]:
    """Return how many trajectories are compared, and how many side by side."""
    return config.eps_error_samples, min(config.eps_error_samples, config.batch_size)


def _say(change: Tensor, correlation: Tensor) -> None:
    worst = int(change.argmax())
    log.log(
        logging.WARNING if float(change[worst]) > 0.01 else logging.INFO,
        "the correction changes the eps error of other trajectories by %+.1f %% on average, by %+.1f %% in step %d",
        100 * float(change.mean()), 100 * float(change[worst]), worst,
    )
    if len(correlation):
        log.info(
            "residuals of consecutive steps correlate by %.2f to %.2f (variance correction takes them for independent)",
            float(correlation.min()), float(correlation.max()),
        )


def noise_of_widths(run: Run, config: CorrectionConfig, key: Key, quantized: QuantizedModel) -> list[MomentChunks]:
    """Measure the noise of the network at each of its widths, on the same full-precision trajectories.

    Args:
        key: of the quantized network, see `Keys.quantization`.
    """
    networks = [quantized.at_row(row) for row in range(len(quantized.widths))]
    moments = collect(run, config, "noise of each width", networks, "fp32", key)
    return [MomentChunks(moments, torch.full((len(run.grid),), row)) for row in range(len(networks))]


def collect(
    run: Run, config: CorrectionConfig, title: str, networks: list[nn.Module], follow: str, key: Key
) -> np.ndarray:
    """Measure moments [n, W, S, C, M] of `networks` on calibration trajectories."""
    module = NoiseModule(
        run.model, run.full_precision, networks, run.grid, seed=run.seed, stream=CALIBRATION, follow=follow
    )
    batch_size = min(config.n_samples, config.batch_size)
    key = {**key, "stream": CALIBRATION, "follow": follow}
    return measured(run, title, module, config.n_samples, batch_size, key)["moments"]


def fit(run: Run, config: CorrectionConfig, chunks: MomentChunks | Merged) -> NoiseStatistics:
    """Fit the statistics of the noise to moments."""
    return fit_moments(
        chunks, len(run.grid), int(np.prod(run.model.sample_shape[1:])), config.convention,
        correlation=config.correlation, bias=config.bias, shrink=config.shrink and config.convention == "paper",
        repeats=run.grid.first_with_time,
    )


def measured(
    run: Run, title: str, module: NoiseModule | PropagationModule, n: int, batch_size: int, key: Key
) -> Arrays:
    """Return what `module` finds on samples 0..n-1, memory-mapped; reused, or continued where a killed run stopped."""
    kind = "noise" if isinstance(module, NoiseModule) else "propagation"
    key = _key(kind, key, n, batch_size, [*module.names, *module.totals])
    return cached(
        run.cache, kind, key, lambda folder: measure(module, run.trainer(title), n, batch_size, folder), title,
        detail=lambda _: f", {n} trajectories",
    )


def _key(kind: str, key: Key, n: int, batch_size: int, arrays: list[str]) -> Key:
    return versioned(kind, {**key, "samples": [n, batch_size], "arrays": arrays})
