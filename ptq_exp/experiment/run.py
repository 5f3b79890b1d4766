"""`Run`: the objects that the stages of an experiment share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ptq_exp.calibration import WITHOUT_IMAGES
from ptq_exp.deploy.artifact import Artifact
from ptq_exp.diffusion import Call, DiffusionModel, TimeGrid
from ptq_exp.diffusion.zoo.build import mapped_weights
from ptq_exp.diffusion.zoo.registry import check_numbers
from ptq_exp.errors import CheckpointError, ConfigError, PTQError
from ptq_exp.evaluation import FeatureExtractor
from ptq_exp.experiment.pipeline import check_pipeline
from ptq_exp.lightning import Bar, make_trainer
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization.offload import (
    bring_in_before_calls_,
    mapped_copy,
    outermost,
    stream_weights_,
    weight_bytes,
)
from ptq_exp.runtime import GraphedNetwork
from ptq_exp.settings.build import build, constructor
from ptq_exp.settings.schema import CalibrationConfig, ExperimentConfig
from ptq_exp.storage.cache import ArtifactCache

PARTS = "parts"
"""Folder of the cache for weights that lie in files."""
_NOT_OF_LIGHTNING = ("threads", "max_memory_gb", "cuda_graph")


@dataclass(frozen=True)
class Run:
    """The objects of one execution.

    Attributes:
        model: in full precision.
        grid: the sampling steps.
        guidance_scale: of classifier-free guidance, 1 = none.
        seed: of all noise that is drawn.
        device: where to compute.
        cache: what runs share.
        extractor: of features of images; None = images are not scored.
        trainer_settings: arguments of `make_trainer`.
        compile: whether networks are compiled.
        cuda_graph: whether evaluations of a sampling step are recorded and replayed.
        max_memory: bytes; a network whose weights do not fit in it twice is quantized block by block. None = in memory.
    """

    model: DiffusionModel
    grid: TimeGrid
    guidance_scale: float
    seed: int
    device: torch.device
    cache: ArtifactCache
    extractor: FeatureExtractor | None
    trainer_settings: Mapping[str, Any]
    compile: bool = False
    cuda_graph: bool = False
    max_memory: float | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, saved: Artifact | None = None, fresh_since: float | None = None) -> Run:
        """Build the objects that `config` names.

        Args:
            saved: the quantized model that is evaluated; None = one is made.
            fresh_since: see `ArtifactCache`.

        Raises:
            PTQError: one of them cannot be built, or the saved model belongs to others.
        """
        _check_constructors(config)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)  # here, too: what is built may compute
            if config.trainer.devices > 1:  # the processes that Lightning starts read it
                os.environ["OMP_NUM_THREADS"] = str(config.trainer.threads)
        model = _model(config, saved)
        if isinstance(model, PipelineModel):
            check_pipeline(config)
        if saved is not None:
            saved.check_model(model)
        if config.model.channels_last:
            model.denoiser.to(memory_format=torch.channels_last)
        trainer_settings = {key: value for key, value in asdict(config.trainer).items() if key not in _NOT_OF_LIGHTNING}
        device = make_trainer("", **trainer_settings).strategy.root_device
        if config.trainer.cuda_graph:
            _check_cuda_graph(device)
        sampler = config.sampler
        grid = model.time_grid(sampler.steps, sampler.spacing, eta=sampler.eta, solver=sampler.solver)
        scale = model.sampler.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
        extractor = _extractor(config.evaluation.extractor, device)
        cache = ArtifactCache(config.cache_dir, config.cache, fresh_since, config.cache_lease)
        if saved is not None:
            saved.check_grid(grid, scale)
        run = cls(
            model, grid, scale, config.seed, device, cache, extractor, trainer_settings, config.model.compile,
            config.trainer.cuda_graph, bytes_of(config.trainer.max_memory_gb),
        )
        if run.blockwise:
            bring_in_before_calls_(model.denoiser, outermost(model.denoiser, model.blocks))
        return run

    def trainer(self, title: str):
        """Make a Lightning Trainer whose progress bar is called `title`."""
        return make_trainer(title, **self.trainer_settings)

    def progress(self, total: int, title: str) -> Bar:
        """Make a progress bar, unless they are switched off."""
        return Bar(total=total, desc=title, disable=not self.trainer_settings["progress_bar"])

    @property
    def full_precision(self) -> nn.Module:
        """The model's own denoiser as the sampler calls it: guided; compiled or recorded where that is asked for."""
        denoiser = self.model.denoiser
        if self.compile:
            denoiser.compile()
        network = GraphedNetwork(denoiser) if self.cuda_graph else self.model.in_parts(denoiser)
        return self.model.guided(network, self.guidance_scale)

    @property
    def blockwise(self) -> bool:
        """Whether the network is quantized block by block, as its weights do not fit in memory twice."""
        return self.max_memory is not None and 2 * weight_bytes(self.model.denoiser) > self.max_memory

    def network_copy(self) -> nn.Module:
        """Return an independent copy of the full-precision network on the device, its weights in files if `blockwise`.

        Raises:
            ConfigError: they would be in files, but the device is no CPU.
        """
        if not self.blockwise:
            return self.model.copy_denoiser().to(self.device)
        if self.device.type != "cpu":
            raise ConfigError(
                f"trainer.max_memory_gb={self.max_memory / 1e9:g}: block by block a CPU computes, not {self.device}: "
                "set trainer.accelerator=cpu, or trainer.max_memory_gb=null"
            )
        network = mapped_copy(self.model.denoiser, self.cache.root / PARTS)
        stream_weights_(network, outermost(network, self.model.blocks))
        return network

    def example(self) -> Call:
        """Return a call of one sample on the device, for tracing."""
        return self.model.example_inputs().to(self.device)

    def noise(self, n: int, generator: torch.Generator) -> Call:
        """Return a call of `n` samples of noise on the device, for timing: zeros have no range."""
        call = self.example().expanded(n).mapped(torch.Tensor.contiguous)
        return call._replace(x=torch.randn(call.x.shape, generator=generator).to(call.x))


def bytes_of(gigabytes: float | None) -> float | None:
    """Return a setting in GB as bytes."""
    return None if gigabytes is None else 1e9 * gigabytes


def open_saved(config: ExperimentConfig) -> Artifact | None:
    """Open the saved quantized model that is to be evaluated; None = one is made."""
    return None if config.quantized is None else Artifact.open(config.quantized)


def needs_images(calibration: CalibrationConfig) -> bool:
    """Say whether calibration may start from real images; a source of somebody else's is offered them."""
    return calibration.source not in (None, *WITHOUT_IMAGES)


def calibration_images(config: ExperimentConfig) -> Any:
    """Open the real images that calibration starts from; None where it needs none, or none are given."""
    node = config.model.images or {}
    if not needs_images(config.calibration) or node.get("path", "shipped") is None:
        return None
    return build(config.model.images, "model.images")


def _extractor(node: dict[str, Any] | None, device: torch.device) -> FeatureExtractor | None:
    if node is None:
        return None
    node = {key: str(device) if key == "device" and value is None else value for key, value in node.items()}
    return build(node, "evaluation.extractor")


def _model(config: ExperimentConfig, artifact: Artifact | None) -> DiffusionModel:
    """Return the full-precision model, of finite weights.

    Raises:
        CheckpointError: it cannot be read; of a saved quantized model, also how to name what it was made from.
    """
    node = config.model.build
    try:
        with nullcontext() if (most := bytes_of(config.trainer.max_memory_gb)) is None else mapped_weights(most):
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


def _check_cuda_graph(device: torch.device) -> None:
    """Raise ConfigError where no evaluation can be recorded."""
    if device.type != "cuda":
        raise ConfigError(
            f"trainer.cuda_graph=true: CUDA graphs need an NVIDIA GPU, and this run computes on {device}: set "
            "trainer.cuda_graph=false, or trainer.accelerator=gpu where there is one"
        )


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
    if config.model.extractor is not None:
        constructor(config.model.extractor, "model.extractor")
    if config.model.images is not None and config.calibration.source in ("raw", "diffuse"):
        constructor(config.model.images, "model.images")
