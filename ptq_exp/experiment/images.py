"""The stages that draw images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptq_exp.deploy.measure import Trajectory
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, cached, resumable
from ptq_exp.lightning import EvaluationModule, draw_images
from ptq_exp.results.record import read_samples, write_samples
from ptq_exp.settings.schema import EvaluationConfig
from ptq_exp.storage.atomic import share_file
from ptq_exp.storage.pieces import JOINED


def full_precision_images(run: Run, config: EvaluationConfig, key: Key) -> np.ndarray:
    """Draw (or reuse) the full-precision images, uint8 [N, H, W, C], memory-mapped."""

    def make(folder: Path) -> np.ndarray:
        return _drawn(run, config, run.full_precision, "FP32 images", folder, folder / JOINED)

    return cached(
        run.cache, "images", key, make, "FP32 images", save=lambda images, path: write_samples(path, images),
        load=lambda path: read_samples(path)[0], detail=lambda images: f", {len(images)}",
    )


def quantized_images(
    run: Run, config: EvaluationConfig, key: Key, quantized: QuantizedModel, title: str, path: Path,
    watched: Trajectory | None = None,
) -> np.ndarray:
    """Draw (or reuse) the images of the quantized model, in the file `path`; a killed run with the same key continues.

    The cache and `path` share one file on disk, where they can.

    Args:
        key: see `Keys.quantized_images`.
        watched: its denoiser, where the trajectory of the first images is wanted; a run that reuses images, or is
            continued, has drawn them before, and nothing is watched.

    Returns:
        uint8 [N, H, W, C], memory-mapped: a set of images may be larger than the memory.
    """
    of_pieces = {name: value for name, value in key.items() if name != "drawn_by"}  # continued on any machine

    def make(_: Path) -> Path:
        with resumable(run.cache, "quantized images", of_pieces) as folder:
            denoiser = quantized.denoiser if watched is None else watched
            drawn_before = folder.exists() and any(folder.iterdir())
            _drawn(run, config, denoiser, title, folder, path, **quantized.noise_in_eps)
        if watched is not None and drawn_before:
            watched.forget()
        return path

    cached(
        run.cache, "quantized_images", key, make, title, save=share_file, load=lambda artefact: artefact,
        when_reused=lambda artefact: share_file(artefact, path), detail=lambda _: f", {config.n_samples}",
    )
    return read_samples(path)[0]


def _drawn(
    run: Run, config: EvaluationConfig, denoiser: nn.Module, title: str, folder: Path, path: Path, **noise_in_eps: Any
) -> np.ndarray:
    """Images of samples 0..N-1 drawn with the guided `denoiser`; batches already in `folder` are not drawn again."""
    module = EvaluationModule(run.model, denoiser, run.grid, seed=run.seed, **noise_in_eps)
    draw_images(module, run.trainer(title), config.n_samples, config.batch_size, folder, path)
    return read_samples(path)[0]
