"""What a pipeline evaluates, and what it does beside its network: text encoders, scheduler, autoencoder."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from ptq_exp.experiment.forecast.work import FULL, OBSERVED, QUANTIZED, Evaluations, Work
from ptq_exp.experiment.plan import drawn_positions
from ptq_exp.pipelines import PipelineModel
from ptq_exp.settings.schema import ExperimentConfig


class Zeros(nn.Module):
    """Answers a pipeline with zeros, at once."""

    def __init__(self, model: PipelineModel) -> None:
        super().__init__()
        channels, height, *rest = model.sample_shape
        self.shape = channels, height // model.copies, *rest

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return zeros in the shape of an estimate."""
        return x.new_zeros(len(x), *self.shape)


def of_pipeline(work: Work, config: ExperimentConfig, model: PipelineModel, steps: int, seed: int) -> Work:
    """Return the evaluations of a pipeline in place of those of our own sampler; samples are rows of its network.

    For an image a pipeline evaluates several rows, in one call or more. What is observed are recorded rows.
    """
    calibration, found = config.calibration, {}
    for stage, evaluations in work.items():
        if stage.startswith("calibration_set"):
            network = FULL if stage == "calibration_set" else QUANTIZED
            evaluations = _recorded(config, steps, seed, network)
        elif any(e.network == OBSERVED for e in evaluations):
            rows = calibration.n_samples * calibration.steps_per_sample * model.copies
            batch = min(rows, calibration.batch_size)
            found[stage] = (Evaluations(OBSERVED, math.ceil(rows / batch), rows, batch), *evaluations[1:])
            continue
        found[stage] = tuple(
            replace(e, times=e.times * model.calls, samples=e.samples * model.copies,
                    largest=math.ceil(e.largest * model.copies / model.calls)) for e in evaluations
        )
    return found


def _recorded(config: ExperimentConfig, steps: int, seed: int, network: str) -> tuple[Evaluations, ...]:
    """Return the evaluations of the images whose calls are recorded: a batch runs up to the last of its steps."""
    calibration = config.calibration
    if calibration.source is None:
        return ()
    drawn = drawn_positions(calibration, steps, seed, calibration.steps_per_sample)
    batches = [(int(part.max()) + 1, len(part)) for part in drawn.split(calibration.batch_size)]
    largest = min(calibration.batch_size, calibration.n_samples)
    return (Evaluations(network, sum(n for n, _ in batches), sum(n * size for n, size in batches), largest),)
