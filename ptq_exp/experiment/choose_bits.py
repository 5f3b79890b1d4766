"""The stages of bits=auto: errors of groups of layers alone, the best choices within the budgets, the best of these."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.correction import measured_steps
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.experiment.choices import Choices, with_candidates
from ptq_exp.experiment.keys import Keys, versioned
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Arrays, Made, Record, cached
from ptq_exp.experiment.stages import quantize_model
from ptq_exp.experiment.transforms import transformed
from ptq_exp.lightning import SensitivityModule, measure_sensitivity
from ptq_exp.quantization import probe_of
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.pieces import slices

log = logging.getLogger("ptq_exp")

FILE = "allocation.npz"
"""Errors and costs of all groups and candidates."""


@dataclass(frozen=True)
class Measured:
    """A choice, with what was predicted of it and what was measured.

    Attributes:
        choice: number of the candidate of each group.
        predicted: relative eps error if the errors of groups were independent.
        measured: relative error of the final state, geometric mean over trajectories.
        name: the candidate where all groups have the same; "" otherwise.
    """

    choice: tuple[int, ...]
    predicted: float
    measured: float
    name: str = ""


def measure_alone(run: Run, config: ExperimentConfig, choices: Choices, states: CalibrationSet) -> np.ndarray:
    """Measure the relative eps error [G, C, S] of every group at every candidate, all else in full precision.

    On trajectories of the full-precision model whose noise no image is drawn from. Weights and activations are
    quantized together, by the ranges that the network has where the candidate is that of all groups.
    """
    trials = _Trials(run, config, choices, states)
    return np.stack([trials.errors(number) for number in range(len(choices.candidates))], 1)


def best_choice(
    run: Run, config: ExperimentConfig, choices: Choices, error: np.ndarray, states: CalibrationSet
) -> Made:
    """Solve the allocation, measure the best solutions on whole trajectories and take the best of them.

    Solutions differ in a twentieth of the groups at least. One candidate for all groups is measured, too, wherever it
    is within the budgets.

    Args:
        error: from `measure_alone`.

    Returns:
        The settings with the widths of each layer, and the entry `allocation` of results.json.
    """
    score = np.square(error).mean(2)
    problem = choices.allocation(score)
    solved = [one.choice for one in problem.best(config.bits.solutions, max(1, len(choices.groups) // 20))]
    trials, found = _Trials(run, config, choices, states), []
    for choice in dict.fromkeys([*solved, *choices.uniform()]):
        used = {choices.candidates[number] for number in choice}
        predicted = float(np.sqrt(problem.score_of(choice)))
        found.append(Measured(choice, predicted, trials.final_error(choice), used.pop() if len(used) == 1 else ""))
    best = min(found, key=lambda one: one.measured)
    log.info("bits of %d groups of layers: %s", len(choices.groups), _counts(choices, best))
    arrays = {
        "layers": np.array([name for group in choices.groups for name in group]),
        "group": np.array([number for number, group in enumerate(choices.groups) for _ in group]),
        "candidates": np.array(choices.candidates), "error": error, "chosen": np.array(best.choice),
        **{f"cost_{limit.name}": limit.cost for limit in choices.limits},
    }
    settings = with_candidates(config, choices.groups, choices.candidates, best.choice)
    files = {FILE: lambda path: write_npz(path, **arrays)}
    return Made(settings, Record({"allocation": _entry(choices, error, found, best)}, files))


def _entry(choices: Choices, error: np.ndarray, found: list[Measured], best: Measured) -> dict:
    """Lay out candidates, solutions and the choice for results.json."""
    alone = np.sqrt(np.square(error).mean(2))
    return {
        "file": FILE, "candidates": list(choices.candidates), "groups": len(choices.groups),
        "budget": {limit.name: limit.value for limit in choices.limits},
        "solutions": [
            {"uniform": one.name, "predicted_eps_error": one.predicted, "final_error": one.measured,
             "chosen": one is best, "counts": _counts(choices, one),
             **{limit.name: limit.of(one.choice) for limit in choices.limits}}
            for one in found
        ],
        "layers": choices.layers(best.choice),
        "chosen": [
            {"layers": list(group), "bits": choices.candidates[c], "eps_error": float(error[c])}
            for group, c, error in zip(choices.groups, best.choice, alone, strict=True)
        ],
    }


def _counts(choices: Choices, one: Measured) -> dict[str, int]:
    """Count the groups of each candidate, in the order of the candidates."""
    counts = Counter(one.choice)
    return {name: counts[number] for number, name in enumerate(choices.candidates) if counts[number]}


@dataclass(frozen=True)
class _Trials:
    """Quantizes the network by choices, and measures what that does."""

    run: Run
    config: ExperimentConfig
    choices: Choices
    states: CalibrationSet

    def quantized(self, choice: tuple[int, ...]) -> tuple[QuantizedModel, Keys]:
        """Return the network with the candidates of a choice, and its keys."""
        run, choices = self.run, self.choices
        settings = with_candidates(self.config, choices.groups, choices.candidates, choice)
        keys = Keys(settings, run.model, run.grid, run.guidance_scale)
        return quantize_model(run, Plan.of(settings, run.grid), keys, self.states), keys

    def errors(self, number: int) -> np.ndarray:
        """Measure the errors [G, S] of the groups at one candidate."""
        run, bits, groups = self.run, self.config.bits, self.choices.groups
        quantized, keys = self.quantized((number,) * len(groups))
        probe = probe_of(quantized.network, transformed(run, quantized.transforms))
        denoiser = replace(quantized, network=probe, compile=False, cuda_graph=False).denoiser
        steps, n = measured_steps(len(run.grid), bits.sensitivity_steps), bits.sensitivity_samples
        module = SensitivityModule(
            run.model, denoiser, probe, quantized.network, run.grid, groups, steps, range(n), seed=run.seed,
            batch_size=n, stream=CALIBRATION,
        )
        key = versioned("sensitivity", keys.ranges(1)) | {
            "layers": [list(group) for group in groups], "steps": steps, "samples": [n, n], "stream": CALIBRATION,
        }
        name = self.choices.candidates[number]

        def make(folder: Path) -> Arrays:
            return {"sensitivity": measure_sensitivity(module, run.trainer(f"{len(groups)} groups at {name}"), folder)}

        return np.array(cached(run.cache, "sensitivity", key, make, f"sensitivity at {name}")["sensitivity"])

    def final_error(self, choice: tuple[int, ...]) -> float:
        """Measure how far trajectories end from those of full precision, relative, geometric mean over them.

        That mean is what PSNR averages; a few trajectories that end in another image do not outweigh all others.
        """
        run, n, batch_size = self.run, self.config.bits.solution_samples, self.config.evaluation.batch_size
        quantized, keys = self.quantized(choice)
        key = versioned("solution", keys.ranges(1)) | {"samples": [n, batch_size], "stream": CALIBRATION}

        def ends(denoiser: nn.Module, samples: range) -> Tensor:
            return run.model.run(
                denoiser, run.grid, samples, run.seed, stream=CALIBRATION, device=run.device
            ).double().flatten(1)

        def make(folder: Path) -> Arrays:
            errors = []
            with run.progress(n, "a solution on whole trajectories") as bar, torch.no_grad():
                for rows in slices(n, batch_size):
                    samples = range(rows.start, rows.stop)
                    wanted = ends(run.full_precision, samples)
                    errors.append((ends(quantized.denoiser, samples) - wanted).norm(dim=1) / wanted.norm(dim=1))
                    bar.update(len(samples))
            return {"error": torch.cat(errors).cpu().numpy()}

        found = cached(run.cache, "solution", key, make, "solution on whole trajectories")
        return float(np.exp(np.log(np.maximum(found["error"], 1e-12)).mean()))
