"""Modules that analyse a network with `Trainer.predict`: its activations per step, and the error of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ptq_exp.diffusion import Call, DiffusionModel, TimeGrid
from ptq_exp.diffusion.noise import EVALUATION
from ptq_exp.diffusion.sampler import StepRecord
from ptq_exp.lightning.writer import measure
from ptq_exp.quantization.probe import layers_quantized
from ptq_exp.quantization.trace.tap import ActivationTap


class ActivationModule(pl.LightningModule):
    """`predict` on sample indices [B] -> {"low": [B, O, S], "high": [B, O, S], "values": [B, O, S, K]}.

    What reaches O activation quantizers in S steps of the trajectories that `denoiser`, guided already, makes; see
    `ActivationTap` for K.

    Args:
        probe: the network inside `denoiser`, its quantizers off.
        sites: names of its activation quantizers.
        steps: positions in `grid`, ascending.
        copies: of each sample in a batch: 2 with guidance.
    """

    names, totals = ("low", "high", "values"), ()

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, probe: nn.Module, grid: TimeGrid, sites: Sequence[str],
        steps: Sequence[int], *, seed: int, values: int, copies: int,
    ) -> None:
        super().__init__()
        self.denoiser, self.probe = denoiser, probe
        self.model, self.grid, self.sample_seed = model, grid, seed
        self.sites, self.steps, self.values, self.copies = list(sites), list(steps), values, copies

    def predict_step(self, indices: Tensor) -> dict[str, np.ndarray]:
        tap = ActivationTap(self.probe, self.sites, self.values, self.copies)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(r: StepRecord) -> None:
            if r.step in self.steps:
                found.append(tap.take())
            if r.step + 1 in self.steps:
                tap.start(len(indices))

        try:
            if 0 in self.steps:
                tap.start(len(indices))
            with torch.no_grad():
                self.model.run(
                    self.denoiser, self.grid, indices.tolist(), self.sample_seed, device=self.device, on_step=record
                )
        finally:
            tap.remove()
        return {name: torch.stack(part, 2).numpy() for name, part in zip(self.names, zip(*found, strict=True),
                                                                          strict=True)}


class _State(NamedTuple):
    column: int  # which of the steps
    call: Call
    eps: Tensor


class SensitivityModule(pl.LightningModule):
    """`predict` on the number of a group of layers [1] -> {"error": [1, S]}: relative eps error with these quantized.

    ||eps_l - eps|| / ||eps|| over all samples of each of S steps, on full-precision trajectories.

    Args:
        denoiser: around `probe`, guided already.
        probe, quantized: see `ptq_exp.quantization.probe`.
        layers: groups of layers, in the order of their numbers: their names.
        steps: positions in `grid`, ascending.
        samples: indices of the trajectories, of noise from `stream`.
        batch_size: trajectories at a time.
    """

    names, totals = ("error",), ()

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, probe: nn.Module, quantized: nn.Module, grid: TimeGrid,
        layers: Sequence[Sequence[str]], steps: Sequence[int], samples: Sequence[int], *, seed: int, batch_size: int,
        stream: int = EVALUATION,
    ) -> None:
        super().__init__()
        self.denoiser, self.probe, self.quantized = denoiser, probe, quantized
        self.model, self.grid, self.sample_seed = model, grid, seed
        self.layers, self.steps, self.samples, self.batch_size = list(layers), list(steps), list(samples), batch_size
        self.stream = stream
        self._states: list[_State] = []

    def on_predict_start(self) -> None:
        """Draw the trajectories, once: their states and estimates serve all layers."""
        self._states = []
        for start in range(0, len(self.samples), self.batch_size):
            self._follow(self.samples[start : start + self.batch_size])

    def predict_step(self, layer: Tensor) -> dict[str, np.ndarray]:
        error = torch.zeros(len(self.steps), dtype=torch.float64)
        norm = torch.zeros_like(error)
        with layers_quantized(self.probe, self.quantized, self.layers[int(layer)]), torch.no_grad():
            for state in self._states:
                estimate = state.call.evaluate(self.denoiser)
                error[state.column] += float((estimate - state.eps).double().square().sum())
                norm[state.column] += float(state.eps.double().square().sum())
        return {"error": (error / norm).sqrt()[None].numpy()}

    def _follow(self, samples: Sequence[int]) -> None:
        def record(r: StepRecord) -> None:
            if r.step in self.steps:
                self._states.append(_State(self.steps.index(r.step), r.call, r.eps))

        with torch.no_grad():
            self.model.run(
                self.denoiser, self.grid, samples, self.sample_seed, stream=self.stream, device=self.device,
                on_step=record, steps=self.steps[-1] + 1,
            )


def measure_sensitivity(module: SensitivityModule, trainer: pl.Trainer, folder: Path) -> np.ndarray:
    """Measure the error [L, S] of all groups of layers; those already in `folder` are not measured again."""
    return measure(module, trainer, len(module.layers), 1, folder)["error"]
