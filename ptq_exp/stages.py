"""The stages of an experiment: each takes what it needs, reuses shared artefacts, and says what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import ptq_exp
from ptq_exp.calibration import CalibrationSet, positions
from ptq_exp.config import ExperimentConfig, build
from ptq_exp.diffusion import DiffusionModel, TimeGrid, relative_eps_error
from ptq_exp.evaluation.features import FeatureExtractor, extract_features
from ptq_exp.evaluation.images import from_uint8
from ptq_exp.evaluation.reference import FeatureStatistics
from ptq_exp.lightning import (
    CalibrationModule,
    EvaluationModule,
    collect_calibration_set,
    draw_images,
    make_trainer,
)
from ptq_exp.quantization import (
    Report,
    Rule,
    calibrate_weights_,
    calibrating,
    default_rules,
    finish_calibration,
    quantize_,
)
from ptq_exp.tracking.cache import ArtifactCache, digest
from ptq_exp.tracking.results import read_samples, write_samples

log = logging.getLogger("ptq_exp")


@dataclass
class Setup:
    """What all stages share: the settings, the model on its time grid, the extractor and the artefact cache."""

    config: ExperimentConfig
    model: DiffusionModel
    grid: TimeGrid
    extractor: FeatureExtractor
    cache: ArtifactCache

    @classmethod
    def of(cls, config: ExperimentConfig) -> Setup:
        """Build the objects that `config` names."""
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        model = build(config.model.build, "model.build", name=config.model.name)
        extractor = build(config.evaluation.extractor, "evaluation.extractor")
        cache = ArtifactCache(config.cache_dir, config.cache)
        return cls(config, model, model.time_grid(config.sampler.steps, config.sampler.spacing), extractor, cache)

    def trainer(self, title: str):
        """A Lightning Trainer whose progress bar is called `title`."""
        settings = {key: value for key, value in asdict(self.config.trainer).items() if key != "threads"}
        return make_trainer(title, **settings)

    def sampling_spec(self) -> dict[str, Any]:
        """All that decides a full-precision trajectory of a given sample index."""
        sampler = self.config.sampler
        return {
            "version": ptq_exp.__version__,
            "model": self.model.digest,
            "sampler": sampler.name,
            "steps": sampler.steps,
            "spacing": sampler.spacing,
            "eta": sampler.eta,
            "seed": self.config.seed,
        }

    def calibration_spec(self) -> dict[str, Any]:
        """All that decides the calibration set."""
        return self.sampling_spec() | {"calibration": asdict(self.config.calibration)}

    def images_spec(self) -> dict[str, Any]:
        """All that decides the full-precision images."""
        evaluation = self.config.evaluation
        return self.sampling_spec() | {"n_samples": evaluation.n_samples, "batch_size": evaluation.batch_size}


def _said(what: str, value_and_reused: tuple[Any, bool], detail: Callable[[Any], str] = lambda value: "") -> Any:
    """Say whether an artefact was reused or computed, and return it."""
    value, reused = value_and_reused
    log.info("%s: %s%s", what, "reused from the cache" if reused else "computed", detail(value))
    return value


def make_calibration_set(setup: Setup) -> CalibrationSet:
    """Collect (or reuse) the calibration set that `calibration` describes."""
    config = setup.config.calibration

    def make() -> CalibrationSet:
        distribution = build(config.distribution, "calibration.distribution")
        steps = positions(distribution, config.n_samples, len(setup.grid), setup.config.seed)
        images = None
        if setup.config.model.images is not None:
            images = from_uint8(build(setup.config.model.images, "model.images"))
        module = CalibrationModule(
            setup.model, setup.grid, config.source, seed=setup.config.seed, eta=setup.config.sampler.eta, images=images
        )
        return collect_calibration_set(module, setup.trainer("calibration set"), steps, config.batch_size)

    found = setup.cache.get_or_make(
        "calibration", setup.calibration_spec(), make=make, save=CalibrationSet.save, load=CalibrationSet.load,
        suffix=".safetensors",
    )  # fmt: skip
    return _said(
        f"calibration set {config.name}", found, lambda s: f", {len(s)} states, {s.evaluations} network evaluations"
    )


def policy(config: ExperimentConfig) -> list[Rule]:
    """The ordered rules that `quantization` and `bits` describe."""
    quantization, bits = config.quantization, config.bits
    rules = [Rule(pattern, None, "quantization.keep_fp") for pattern in quantization.keep_fp]
    return rules + default_rules(
        bits.weight, bits.activation, softmax_bits=bits.softmax, first_last_bits=bits.first_last,
        boundary_bits=bits.boundary, first=quantization.first, last=quantization.last, attention=quantization.attention,
        weight_symmetric=quantization.weight_symmetric, weight_granularity=quantization.weight_granularity,
        activation_symmetric=quantization.activation_symmetric,
    )  # fmt: skip


def quantize_model(setup: Setup, calibration_set: CalibrationSet) -> tuple[nn.Module, Report]:
    """Return a quantized twin of the model's denoiser, calibrated, and the account of its layers."""
    config = setup.config
    quantized = setup.model.twin()
    report = quantize_(quantized, policy(config), setup.model.example_inputs())
    calibrate_weights_(quantized, config.metric.name)
    batches = list(calibration_set.batches(config.calibration.batch_size))
    with calibrating(quantized), torch.no_grad():
        for x, t in tqdm(batches, desc="calibration forward", disable=not config.trainer.progress_bar):
            quantized(x, t)
    finish_calibration(quantized, config.metric.name)
    return quantized, report


def draw(setup: Setup, denoiser: nn.Module, title: str, folder: Path) -> np.ndarray:
    """Images uint8 [N, H, W, C] of samples 0..N-1, drawn with `denoiser`; resumes from the batches in `folder`."""
    config = setup.config
    module = EvaluationModule(setup.model, denoiser, setup.grid, seed=config.seed, eta=config.sampler.eta)
    return draw_images(
        module, setup.trainer(title), config.evaluation.n_samples, config.evaluation.batch_size, folder
    )


def full_precision_images(setup: Setup) -> np.ndarray:
    """Draw (or reuse) the images of the full-precision twin."""
    spec = setup.images_spec()
    parts = Path(setup.config.cache_dir) / "parts" / digest("images", spec)
    found = setup.cache.get_or_make(
        "images", spec, make=lambda: draw(setup, setup.model.denoiser, "FP32 images", parts),
        save=lambda images, path: write_samples(path, images), load=lambda path: read_samples(path)[0],
    )  # fmt: skip
    return _said("FP32 images", found, lambda images: f", {len(images)}")


def quantized_images(setup: Setup, quantized: nn.Module) -> np.ndarray:
    """Draw the images of the quantized model; a killed run with the same settings is continued."""
    config = setup.config
    spec = setup.images_spec() | setup.calibration_spec() | {
        "metric": config.metric.name, "bits": asdict(config.bits), "quantization": asdict(config.quantization),
    }  # fmt: skip
    parts = Path(config.cache_dir) / "parts" / digest("images", spec)
    return draw(setup, quantized, f"{config.bits.name.upper()} images", parts)


def reference_features(setup: Setup) -> FeatureStatistics:
    """Features of the real images that all scores refer to, computed or reused."""
    node = setup.config.evaluation.reference
    spec = {"version": ptq_exp.__version__, "reference": node, "extractor": setup.extractor.name}

    def make() -> FeatureStatistics:
        images = build(node, "evaluation.reference")
        return extract_features(setup.extractor, images, name=f"{setup.config.evaluation.name}, {len(images)} real")

    found = setup.cache.get_or_make(
        "reference", spec, make=make, save=FeatureStatistics.save, load=FeatureStatistics.load
    )
    return _said("reference features", found, lambda features: f", {len(features)} images")


def eps_error(setup: Setup, quantized: nn.Module) -> list[float]:
    """Relative eps error of each sampling step, on full-precision trajectories of the first few samples."""
    n, config = setup.config.evaluation.eps_error_samples, setup.config
    with tqdm(total=len(setup.grid), desc="eps error", disable=not config.trainer.progress_bar) as bar:
        errors = relative_eps_error(
            setup.model, quantized, setup.grid, range(n), config.seed, eta=config.sampler.eta, on_step=bar.update
        )
    return errors.tolist()
