"""How often each stage evaluates a network, and on how many samples at once: known from the settings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ptq_exp.correction import measured_steps
from ptq_exp.diffusion import TimeGrid
from ptq_exp.experiment.plan import drawn_states
from ptq_exp.settings.schema import RULES, CalibrationConfig, ExperimentConfig

FULL, QUANTIZED, OBSERVED, EXECUTED = "full precision", "quantized", "observed", "executed"
"""The networks: in full precision, quantized, quantized while its activations are recorded, executed by an engine."""


@dataclass(frozen=True)
class Evaluations:
    """Evaluations of a network.

    Attributes:
        network: FULL, QUANTIZED, OBSERVED or EXECUTED.
        times: how many.
        samples: how many samples in all of them.
        largest: most samples at once.
    """

    network: str
    times: float
    samples: float
    largest: int

    @classmethod
    def batches(cls, network: str, n: int, batch: int, steps: int = 1) -> Evaluations:
        """Return `steps` evaluations of each batch; all batches have `batch` samples, what runs past `n` is cut."""
        times = math.ceil(n / batch) * steps
        return cls(network, times, times * batch, batch)


Work = Mapping[str, tuple[Evaluations, ...]]


def work_of(
    config: ExperimentConfig, grid: TimeGrid, *, quantizes: bool, quantized: bool, seed: int, guided: bool = False
) -> Work:
    """Map each stage that evaluates networks to its evaluations.

    Args:
        quantizes: a quantized network is made.
        quantized: there is one, made or loaded.
        guided: calibration states are seen with their conditions and without; evaluations in full precision and
            quantized are those of guided networks, one for both.
    """
    evaluation, steps = config.evaluation, len(grid)
    drawn = Evaluations.batches(FULL, evaluation.n_samples, evaluation.batch_size, steps)
    work: dict[str, tuple[Evaluations, ...]] = {"fp32_images": (drawn,)}
    if quantizes:
        states = config.calibration.n_samples if config.calibration.source is not None else 2
        batch = min(states, config.calibration.batch_size)
        for n in range(1, config.calibration.rounds + 1):
            suffix = "" if n == 1 else f"_{n}"
            drawn_by = FULL if n == 1 else QUANTIZED
            work[f"calibration_set{suffix}"] = calibration_work(config.calibration, grid, seed, drawn_by)
            seen = 2 if guided and config.calibration.source is not None else 1
            observed = Evaluations(OBSERVED, math.ceil(states / batch), seen * states, seen * batch)
            work[f"quantize{suffix}"] = (observed, *_of_times(config, grid, batch))
        work["bit_schedule"] = _rule(config, steps)
        work["noise_statistics"] = _correction(config, steps)
    if quantized:
        draws = QUANTIZED if config.runtime.name == "simulate" else EXECUTED
        n, batch = evaluation.eps_error_samples, min(evaluation.eps_error_samples, evaluation.batch_size)
        work["eps_error"] = tuple(Evaluations.batches(network, n, batch, steps) for network in (FULL, draws))
        work["quantized_images"] = (
            Evaluations.batches(draws, evaluation.n_samples, evaluation.batch_size, steps),
        )
    return {stage: found for stage, found in work.items() if found}


def calibration_work(config: CalibrationConfig, grid: TimeGrid, seed: int, network: str) -> tuple[Evaluations, ...]:
    """Return the evaluations that the states of a calibration set take; a trajectory leaves its batch at its state."""
    if config.source != "denoise":
        return ()
    states = drawn_states(config, grid, seed)
    enters = states.enters[states.order]
    batches = enters.split(config.batch_size)
    if grid.make_scheduler is not None:  # all pay for the last
        enters = torch.cat([torch.full_like(batch, int(batch.max())) for batch in batches])
    times = sum(int(batch.max()) for batch in batches)
    return (Evaluations(network, times, int(enters.sum()), min(config.batch_size, config.n_samples)),)


def _of_times(config: ExperimentConfig, grid: TimeGrid, batch: int) -> tuple[Evaluations, ...]:
    """Return the evaluations in which layers that depend on the time alone see all times."""
    if config.quantization.time_layers != "all_steps" or config.calibration.source is None:
        return ()
    n = len(grid.timesteps.unique())
    return (Evaluations(OBSERVED, math.ceil(n / batch), n, min(n, batch)),)


def _rule(config: ExperimentConfig, steps: int) -> tuple[Evaluations, ...]:
    """Return the evaluations by which a rule chooses the bits of each step.

    The noise of every width is measured on the same trajectories; the budget rule also runs each of some steps with the
    error of its estimate to the end.
    """
    bits, correction = config.bits, config.correction
    if bits.schedule not in RULES:
        return ()
    n, batch = correction.n_samples, min(correction.n_samples, correction.batch_size)
    drawn = Evaluations.batches(FULL, n, batch, steps)
    found = (drawn, *(replace(drawn, network=QUANTIZED) for _ in set(bits.candidates or ())))
    if bits.schedule == "snr":
        return found
    n, batch = bits.gain_samples, min(bits.gain_samples, correction.batch_size)
    tried = measured_steps(steps, bits.gain_steps)
    after = sum(steps - 1 - step for step in tried)
    return (*found, Evaluations.batches(FULL, n, batch, steps + after),
            Evaluations.batches(QUANTIZED, n, batch, len(tried)))


def _correction(config: ExperimentConfig, steps: int) -> tuple[Evaluations, ...]:
    correction = config.correction
    if not correction.active or correction.statistics is not None:
        return ()
    if config.bits.schedule in RULES and correction.fit == "estimates" and correction.follow == "fp32":
        return ()  # fitted to what `_rule` has measured
    n, batch = correction.n_samples, min(correction.n_samples, correction.batch_size)
    if correction.fit == "estimates":
        return tuple(Evaluations.batches(network, n, batch, steps) for network in (FULL, QUANTIZED))
    fits, others = 1 + correction.bias, max(2, n // 2)
    judged = math.ceil(others / batch) * steps
    fitted = math.ceil(n / batch) * steps * fits
    return (
        Evaluations(FULL, fitted + judged, fitted * batch + steps * others, batch),
        Evaluations(QUANTIZED, fitted + (1 + fits) * judged, fitted * batch + (1 + fits) * steps * others, batch),
    )
