"""Modules that measure quantization noise with `Trainer.predict`, data-parallel over trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ptq_exp.correction import (
    NoiseStatistics,
    propagated,
    residual_histogram,
    sample_moments,
    standardised_residual,
    step_products,
)
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.diffusion.paired import paired_estimates


class NoiseModule(pl.LightningModule):
    """`predict` on sample indices [B] -> {"moments": [B, W, S, C, M]} of W quantized denoisers on the same states.

    With `statistics` also {"histogram": [B, S, bins], "products": [B, S, 2]} of the first one's standardised residuals,
    see `ptq_exp.correction.residuals`. `denoiser` and `quantized` are guided alike; `stream` and `follow`: see
    `paired_estimates`.

    With `summed` also {"error_sum": [S, C, ...]}, float64, the sum of eps_q - eps of the first quantized denoiser over
    those samples of the batch that are below `summed`; with `statistics` as well also that of eps, "eps_sum".
    """

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, quantized: Sequence[nn.Module], grid: TimeGrid, *, seed: int,
        stream: int, follow: str = "fp32", statistics: NoiseStatistics | None = None, summed: int | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.quantized, self.summed = denoiser, nn.ModuleList(quantized), summed
        self.model, self.grid, self.sample_seed = model, grid, seed
        self.stream, self.follow, self.statistics = stream, follow, statistics

    @staticmethod
    def arrays(corrected: bool, summed: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of what `predict` gives: with a row per sample, and sums over samples."""
        names = ("moments", "histogram", "products") if corrected else ("moments",)
        totals = ("error_sum", "eps_sum") if corrected else ("error_sum",)
        return names, totals if summed else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays with a row per sample that `predict` gives."""
        return self.arrays(self.statistics is not None, self.summed is not None)[0]

    @property
    def totals(self) -> tuple[str, ...]:
        """Of the sums over samples that `predict` gives."""
        return self.arrays(self.statistics is not None, self.summed is not None)[1]

    def predict_step(self, indices: Tensor) -> dict[str, np.ndarray]:
        moments: list[Tensor] = []
        histograms: list[Tensor] = []
        products: list[Tensor] = []
        before: list[Tensor | None] = [None]
        sums: dict[str, list[np.ndarray]] = {name: [] for name in self.totals}
        counted = (indices < (self.summed or 0)).cpu()

        def add(step: int, eps: Tensor, estimates: list[Tensor]) -> None:
            moments.append(torch.stack([sample_moments(eps, eps_q) for eps_q in estimates], 1).cpu())
            if self.statistics is not None:
                residual = standardised_residual(eps, estimates[0], self.statistics, step)
                histograms.append(residual_histogram(residual))
                products.append(step_products(residual, before[0]))
                before[0] = residual
            for name, values in sums.items():
                of = eps.double() if name == "eps_sum" else estimates[0].double() - eps.double()
                values.append(of.cpu()[counted].sum(0).numpy())

        paired_estimates(
            self.model, self.denoiser, list(self.quantized), self.grid, indices.tolist(), self.sample_seed, add,
            stream=self.stream, follow=self.follow, device=self.device,
        )
        found = {"moments": torch.stack(moments, 2).numpy()}
        if self.statistics is not None:
            found |= {"histogram": torch.stack(histograms, 1).numpy(), "products": torch.stack(products, 1).numpy()}
        return found | {name: np.stack(values) for name, values in sums.items()}


class PropagationModule(pl.LightningModule):
    """`predict` on sample indices [B] -> {"cause": [B, G], "effect": [B, G]} of the `steps`; see `propagated`."""

    names, totals = ("cause", "effect"), ()

    def __init__(
        self, model: DiffusionModel, denoiser: nn.Module, quantized: nn.Module, grid: TimeGrid, steps: Sequence[int], *,
        seed: int,
    ) -> None:
        super().__init__()
        self.denoiser, self.quantized, self.steps = denoiser, quantized, list(steps)
        self.model, self.grid, self.sample_seed = model, grid, seed

    def predict_step(self, indices: Tensor) -> dict[str, np.ndarray]:
        cause, effect = propagated(
            self.model, self.denoiser, self.quantized, self.grid, self.steps, indices.tolist(), self.sample_seed,
            device=self.device,
        )
        return {"cause": cause.numpy(), "effect": effect.numpy()}
