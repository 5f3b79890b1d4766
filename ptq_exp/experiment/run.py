"""`Setup`: the objects that all stages of an experiment share, and what identifies their artefacts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ptq_exp
from ptq_exp.calibration import WITHOUT_IMAGES, time_bins
from ptq_exp.correction import BitSchedule, parse_widths
from ptq_exp.deploy.artifact import Artifact
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.diffusion.zoo.registry import check_numbers
from ptq_exp.errors import CheckpointError, ConfigError, DataError, PTQError
from ptq_exp.evaluation import FeatureExtractor, content_digest
from ptq_exp.lightning import make_trainer
from ptq_exp.quantization import group_bits, transforms_of
from ptq_exp.settings.compose import build, constructor
from ptq_exp.settings.schema import FULL_PRECISION, RULES, BitsConfig, ExperimentConfig
from ptq_exp.storage.cache import ArtifactCache, digest


@dataclass
class Setup:
    """What all stages share: settings, the model on its time grid, the extractor (or None), the artefact cache, and the
    saved quantized model to evaluate (or None)."""

    config: ExperimentConfig
    model: DiffusionModel
    grid: TimeGrid
    extractor: FeatureExtractor | None
    cache: ArtifactCache
    device: torch.device
    artifact: Artifact | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, fresh_since: float | None = None) -> Setup:
        """Build the objects that `config` names; `fresh_since`: see `ArtifactCache`."""
        _check_constructors(config)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
            if config.trainer.devices > 1:  # the processes that Lightning starts read it
                os.environ["OMP_NUM_THREADS"] = str(config.trainer.threads)
        artifact = Artifact.open(config.quantized) if config.quantized is not None else None
        model = _model(config, artifact)
        if artifact is not None:
            artifact.check_model(model)
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
        cache = ArtifactCache(config.cache_dir, config.cache, fresh_since)
        setup = cls(config, model, grid, extractor, cache, device, artifact)
        if artifact is not None:
            artifact.check_grid(grid, setup.guidance_scale)
        elif config.bits.name != FULL_PRECISION:
            _ = setup.activation_widths  # a schedule that does not fit is told before anything is computed
        return setup

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

    def calibration_spec(self, calibration_round: int) -> dict[str, Any]:
        """All that decides the calibration set of a round, from 1; later ones also depend on the quantized model."""
        calibration = asdict(self.config.calibration) | {"rounds": calibration_round}
        if calibration["labels"] == "paired":
            del calibration["labels"]  # artefacts of versions without this setting are paired, and stay valid
        spec = self.sampling_spec() | {"calibration": calibration}
        if calibration_round > 1:
            spec |= self._quantizer_settings()
        if not self.needs_images:
            return spec
        images = self.config.model.images or {}
        # a folder may hold other images tomorrow: its content decides, not its name
        content = content_digest(images["path"]) if images.get("path") else None
        return spec | {"images": images, "content": content}

    def ranges_spec(self, calibration_round: int | None = None) -> dict[str, Any]:
        """All that decides the ranges of the quantized network, for all activation widths that it can run at.

        None = those of the last round of calibration.
        """
        if calibration_round is None:
            calibration_round = self.config.calibration.rounds
        return self.calibration_spec(calibration_round) | self._quantizer_settings()

    def _quantizer_settings(self) -> dict[str, Any]:
        bits, policy = asdict(self.config.bits), self.config.quantization
        widths = {key: bits[key] for key in ("weight", "softmax", "first_last", "boundary")}
        # with the defaults of what is not given
        transforms = [transform.to_dict() for transform in transforms_of(policy.transforms)]
        spec = {
            "metric": self.config.metric.name,
            "bits": widths | {"activation": self.activation_widths},
            "quantization": asdict(policy) | {"transforms": transforms},
        }
        return spec | ({"groups": list(self.bit_groups.values())} if self.bit_groups else {})

    @cached_property
    def bit_groups(self) -> dict[str, tuple[str, int, int]]:
        """Setting -> (glob, weight bits, activation bits) of the groups of layers that have widths of their own.

        Globs on the command line come before the names that the model declares: they are narrower.
        """
        named, groups = self.config.model.groups, self.config.bits.groups
        given = sorted((key for key in groups if groups[key] is not None), key=lambda key: key in named)
        settings = {key: f"bits.groups.{key}" for key in given}
        return {settings[key]: (named.get(key, key), *group_bits(settings[key], groups[key])) for key in given}

    def quantization_spec(self) -> dict[str, Any]:
        """All that decides the quantized network: its ranges and, where there is one, its reconstruction."""
        if self.artifact is not None:
            # what was saved decides, not what would be made of the same settings here
            return self.sampling_spec() | {"quantized": self.artifact.digest}
        if not self.config.reconstruction.active:
            return self.ranges_spec()
        settings = asdict(self.config.reconstruction)
        del settings["cache_gb"]  # where rows lie changes nothing
        blocks = list(self.model.blocks) if settings["granularity"] == "block" else []
        if self.config.quantization.time_layers == "all_steps":
            settings["time_layers"] = "on all times"  # an earlier version took them for a part of the blocks
        return self.ranges_spec() | {"reconstruction": settings | {"blocks": blocks}}

    @cached_property
    def time_bins(self) -> Tensor:
        """For each sampling step the row of the activation ranges that it uses, int64 [S]; see `time_bins`."""
        quantization = self.config.quantization
        return time_bins(self.grid, quantization.temporal, quantization.temporal_bins)

    @property
    def n_bins(self) -> int:
        """Number of bins; 1 = the same ranges in all steps."""
        return int(self.time_bins.max()) + 1

    @property
    def activation_widths(self) -> list[int]:
        """The widths that activations are calibrated for, ascending; one, unless they differ between steps."""
        bits = self.config.bits
        if bits.schedule is None:
            return [bits.activation]
        if bits.schedule not in RULES:
            given_schedule(bits, self.grid)
        return sorted(set(bits.candidates or given_schedule(bits, self.grid).widths))

    def images_spec(self) -> dict[str, Any]:
        """All that decides the full-precision images."""
        evaluation = self.config.evaluation
        return self.sampling_spec() | {"n_samples": evaluation.n_samples, "batch_size": evaluation.batch_size}

    def working_folder(self, kind: str, spec: dict[str, Any]) -> Path:
        """Where a killed run finds its pieces again; with cache=off nobody else looks there."""
        alone = f"-{os.getpid()}" if self.config.cache == "off" else ""
        return Path(self.config.cache_dir) / "parts" / f"{digest(kind, spec)}{alone}"

    @contextmanager
    def working_in(self, kind: str, spec: dict[str, Any]) -> Iterator[Path]:
        """The `working_folder` for one process at a time, which removes it when the block ends well."""
        folder = self.working_folder(kind, spec)
        with self.cache.alone("parts", folder.name):
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def images(self) -> Any:
        """The real images that calibration starts from; None where it needs none, or none are given."""
        node = self.config.model.images or {}
        if not self.needs_images or node.get("path", "shipped") is None:
            return None
        return build(self.config.model.images, "model.images")

    @property
    def needs_images(self) -> bool:
        """Whether calibration may start from real images; a source of somebody else's is offered them."""
        return self.config.calibration.source not in (None, *WITHOUT_IMAGES)


def given_schedule(bits: BitsConfig, grid: TimeGrid) -> BitSchedule:
    """The bit schedule that `bits.schedule` spells out or names the file of, for `grid`.

    Raises:
        ConfigError: it does not fit the grid, or its file has another weight width.
        DataError: no such file.
    """
    if isinstance(bits.schedule, str) and bits.schedule.endswith(".json"):
        try:
            schedule = BitSchedule.load(bits.schedule)
        except DataError as error:  # begins with the path
            raise DataError(f"bits.schedule={error}") from error
        schedule.check(grid)
        if schedule.weight != bits.weight:
            raise ConfigError(
                f"{bits.schedule} is for {schedule.weight}-bit weights: set bits.weight={schedule.weight}"
            )
        return schedule
    return BitSchedule(bits.weight, tuple(parse_widths(bits.schedule)), tuple(grid.timesteps.tolist()))


def _model(config: ExperimentConfig, artifact: Artifact | None) -> DiffusionModel:
    """The full-precision model, of finite weights.

    Raises:
        CheckpointError: it cannot be read; of a saved quantized model, also how to name what it was made from.
    """
    node = config.model.build
    try:
        model = build(node, "model.build", name=config.model.name)
    except PTQError as error:
        if artifact is None or not str(error).startswith("model.checkpoint="):
            raise
        raise CheckpointError(
            f"quantized={config.quantized} is compared with images of full precision, whose weights are not in it: set "
            f"model.checkpoint to what it was made from, digest {artifact.identity['digest'][:12]} ({error})"
        ) from error
    if node.get("_target_") != "ptq_exp.load_model":  # which has looked at its numbers already
        check_numbers(model, f"model.build={node.get('_target_')}")
    return model


def _check_constructors(config: ExperimentConfig) -> None:
    """Raise ConfigError for what would be built hours later and cannot be."""
    if config.calibration.source is not None:
        build(config.calibration.distribution, "calibration.distribution")
    if isinstance(config.evaluation.reference, dict) and config.evaluation.extractor is not None:
        constructor(config.evaluation.reference, "evaluation.reference")
        if config.evaluation.reference.get("path", "shipped") is None:
            raise ConfigError(
                f"evaluation={config.evaluation.name} compares with real images, and model={config.model.name} brings "
                "none: set model.images.path, or choose evaluation=paired"
            )
    if config.model.images is not None and config.calibration.source in ("raw", "diffuse"):
        constructor(config.model.images, "model.images")


def _trainer_settings(config: ExperimentConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config.trainer).items() if key != "threads"}
