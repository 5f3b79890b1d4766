"""`Setup`: the objects that all stages of an experiment share, and what identifies their artefacts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import ptq_exp
from ptq_exp.config import build
from ptq_exp.correction import BitSchedule, parse_widths
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.errors import ConfigError
from ptq_exp.evaluation import FeatureExtractor, content_digest
from ptq_exp.lightning import make_trainer
from ptq_exp.schema import BitsConfig, ExperimentConfig
from ptq_exp.tracking.cache import ArtifactCache, digest


@dataclass
class Setup:
    """What all stages share: settings, the model on its time grid, the extractor (or None) and the artefact cache."""

    config: ExperimentConfig
    model: DiffusionModel
    grid: TimeGrid
    extractor: FeatureExtractor | None
    cache: ArtifactCache
    device: torch.device

    @classmethod
    def of(cls, config: ExperimentConfig) -> Setup:
        """Build the objects that `config` names."""
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        model = build(config.model.build, "model.build", name=config.model.name)
        if config.model.channels_last:
            model.denoiser.to(memory_format=torch.channels_last)
        device = make_trainer("", **_trainer_settings(config)).strategy.root_device
        extractor = None
        if config.evaluation.extractor is not None:
            node = config.evaluation.extractor
            node = {key: str(device) if key == "device" and value is None else value for key, value in node.items()}
            extractor = build(node, "evaluation.extractor")
        sampler = config.sampler
        grid = model.time_grid(sampler.steps, sampler.spacing, eta=sampler.eta, solver=sampler.solver)
        return cls(config, model, grid, extractor, ArtifactCache(config.cache_dir, config.cache), device)

    def trainer(self, title: str):
        """A Lightning Trainer whose progress bar is called `title`."""
        return make_trainer(title, **_trainer_settings(self.config))

    def guided(self, denoiser: nn.Module) -> nn.Module:
        """`denoiser` as the sampler calls it: compiled and guided where the settings say so."""
        if self.config.model.compile:
            denoiser.compile()
        return self.model.guided(denoiser, self.guidance_scale)

    @property
    def guidance_scale(self) -> float:
        """Of classifier-free guidance; the model's own where the settings leave it open."""
        asked = self.config.sampler.guidance_scale
        return self.model.sampler.guidance_scale if asked is None else asked

    def progress(self, total: int, title: str) -> tqdm:
        """A progress bar, unless they are switched off."""
        return tqdm(total=total, desc=title, disable=not self.config.trainer.progress_bar)

    def sampling_spec(self) -> dict[str, Any]:
        """All that decides a full-precision trajectory of a given sample index."""
        model = self.config.model
        return {
            "version": ptq_exp.__version__,
            "model": self.model.digest,
            "dtype": model.dtype,
            "layout": [model.channels_last, model.compile],
            "sampler": self.grid.solver,
            "grid": [self.grid.timesteps.tolist(), self.grid.alphas_cumprod.tolist(), self.grid.eta],
            "guidance_scale": self.guidance_scale,
            "seed": self.config.seed,
        }

    def calibration_spec(self) -> dict[str, Any]:
        """All that decides the calibration set."""
        spec = self.sampling_spec() | {"calibration": asdict(self.config.calibration)}
        if not self.needs_images:
            return spec
        images = self.config.model.images or {}
        # a folder may hold other images tomorrow: its content decides, not its name
        content = content_digest(images["path"]) if images.get("path") else None
        return spec | {"images": images, "content": content}

    def ranges_spec(self) -> dict[str, Any]:
        """All that decides the ranges of the quantized network, for all activation widths that it can run at."""
        bits = asdict(self.config.bits)
        widths = {key: bits[key] for key in ("weight", "softmax", "first_last", "boundary")}
        return self.calibration_spec() | {
            "metric": self.config.metric.name,
            "bits": widths | {"activation": self.activation_widths},
            "quantization": asdict(self.config.quantization),
        }

    def quantization_spec(self) -> dict[str, Any]:
        """All that decides the quantized network: its ranges and, where there is one, its reconstruction."""
        if not self.config.reconstruction.active:
            return self.ranges_spec()
        settings = asdict(self.config.reconstruction)
        del settings["cache_gb"]  # where rows lie changes nothing
        blocks = list(self.model.blocks) if settings["granularity"] == "block" else []
        return self.ranges_spec() | {"reconstruction": settings | {"blocks": blocks}}

    @property
    def activation_widths(self) -> list[int]:
        """The widths that activations are calibrated for, ascending; one, unless they differ between steps."""
        bits = self.config.bits
        if bits.schedule is None:
            return [bits.activation]
        return sorted(set(bits.candidates or given_schedule(bits, self.grid).widths))

    def images_spec(self) -> dict[str, Any]:
        """All that decides the full-precision images."""
        evaluation = self.config.evaluation
        return self.sampling_spec() | {"n_samples": evaluation.n_samples, "batch_size": evaluation.batch_size}

    def working_folder(self, kind: str, spec: dict[str, Any]) -> Path:
        """Where a killed run finds its pieces again."""
        return Path(self.config.cache_dir) / "parts" / digest(kind, spec)

    @property
    def needs_images(self) -> bool:
        """Whether calibration starts from real images."""
        return self.config.calibration.source in ("raw", "diffuse")


def given_schedule(bits: BitsConfig, grid: TimeGrid) -> BitSchedule:
    """The bit schedule that `bits.schedule` spells out or names the file of, for `grid`.

    Raises:
        ConfigError: it does not fit the grid, or its file has another weight width.
        DataError: no such file.
    """
    if isinstance(bits.schedule, str) and bits.schedule.endswith(".json"):
        schedule = BitSchedule.load(bits.schedule)
        schedule.check(grid)
        if schedule.weight != bits.weight:
            raise ConfigError(
                f"{bits.schedule} is for {schedule.weight}-bit weights: set bits.weight={schedule.weight}"
            )
        return schedule
    return BitSchedule(bits.weight, tuple(parse_widths(bits.schedule)), tuple(grid.timesteps.tolist()))


def _trainer_settings(config: ExperimentConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config.trainer).items() if key != "threads"}
