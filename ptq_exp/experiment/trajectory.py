"""The correction that is fitted on its own trajectories, and the choice of its parts by the images of others."""

from __future__ import annotations

import logging

import torch

from ptq_exp.correction import Corrected, NoiseStatistics, check_grid, final_error_db, fit_on_trajectory, nearest
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.keys import Keys, versioned
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import cached
from ptq_exp.settings.schema import CorrectionConfig

log = logging.getLogger("ptq_exp")


def trajectory_statistics(run: Run, config: CorrectionConfig, keys: Keys, quantized: QuantizedModel) -> NoiseStatistics:
    """Fit the parts of the correction that `config` allows, and keep what surely brings images nearer.

    Candidates: nothing, the bias, and all parts. They are fitted on the first `correction.n_samples` calibration
    trajectories, and compared on half as many others.

    Raises:
        ConfigError: the sampler's steps are those of a scheduler of diffusers.
    """
    check_grid(run.grid)
    settings = {"correlation": config.correlation, "bias": config.bias, "shrink": config.shrink}
    sizes = [config.n_samples, min(config.n_samples, config.batch_size)]
    key = versioned("trajectory", keys.scheduled(quantized.schedule) | {"trajectory": settings, "samples": sizes})
    return cached(
        run.cache, "trajectory", key, lambda _: _fit(run, config, quantized), "correction on its own trajectory",
        save=NoiseStatistics.save, load=NoiseStatistics.load, detail=lambda _: f", {config.n_samples} trajectories",
    )


def _fit(run: Run, config: CorrectionConfig, quantized: QuantizedModel) -> NoiseStatistics:
    n, batch_size = config.n_samples, min(config.n_samples, config.batch_size)
    parts = {"nothing": (False, False)} | ({"bias": (False, True)} if config.bias else {})
    parts[_named(config)] = (config.correlation, config.bias)
    fits = len(parts) - 1
    batches, others = -(-n // batch_size), range(n, n + max(2, n // 2))
    with run.progress(fits * batches * len(run.grid), "correction") as bar:
        found = [_zero(run, n)] + [
            fit_on_trajectory(
                run.model, run.full_precision, quantized.uncorrected, run.grid, range(n), run.seed,
                correlation=correlation, bias=bias, shrink=config.shrink, batch_size=batch_size, device=run.device,
                on_step=bar.update,
            )
            for correlation, bias in list(parts.values())[1:]
        ]
    denoisers = [run.full_precision, quantized.uncorrected]
    denoisers += [Corrected(quantized.uncorrected, statistics, run.grid) for statistics in found[1:]]
    with run.progress(-(-len(others) // batch_size), "correction: other trajectories") as bar:
        errors = final_error_db(
            run.model, denoisers, run.grid, others, run.seed, batch_size=batch_size, device=run.device,
            on_batch=bar.update,
        )
    chosen = nearest(errors)
    changes = ", ".join(
        f"{name} {change:+.2f} dB" for name, change in zip(parts, (errors[0] - errors).mean(1).tolist(), strict=True)
    )
    log.info("images of %d other trajectories: %s; kept: %s", len(others), changes, list(parts)[chosen])
    return found[chosen]


def _named(config: CorrectionConfig) -> str:
    return "correlation and bias" if config.correlation and config.bias else "bias" if config.bias else "correlation"


def _zero(run: Run, n: int) -> NoiseStatistics:
    """Return the statistics that correct nothing."""
    steps, channels = len(run.grid), run.model.sample_shape[0]
    none, nowhere = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, channels, dtype=torch.float64)
    return NoiseStatistics(none, nowhere, none, none, none, none, nowhere, none, torch.full((steps,), n))
