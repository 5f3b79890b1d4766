"""`QuantizedModel`: a saved quantized model, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.quantization import Report


@dataclass(frozen=True)
class QuantizedModel:
    """A saved quantized model, loaded by `ptq_exp.load_quantized`.

    Attributes:
        model: the diffusion model; its `denoiser` is the full-precision one where `full_precision`, else `network`.
        network: the quantized denoiser alone. Where activations have several widths, choose with `select_row`.
        denoiser: `network` as it is sampled: with guidance, its width at each step, and its correction.
        grid: the sampling steps that it was made for.
        guidance_scale: inside `denoiser`, 1 = none.
        report: account of its operations.
        noise_in_eps: what the sampler is told of the noise in estimates, arguments of `ptq_exp.diffusion.sample`.
        full_precision: whether the full-precision weights are there, too.
    """

    model: DiffusionModel
    network: nn.Module
    denoiser: nn.Module
    grid: TimeGrid
    guidance_scale: float
    report: Report
    noise_in_eps: Mapping[str, Any]
    full_precision: bool
