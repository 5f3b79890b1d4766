"""Declare all settings: names, types, defaults, bounds and meaning; docs/settings.md is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ptq_exp.quantization.policy import Policy
from ptq_exp.settings.field import setting
from ptq_exp.settings.schema_machine import RuntimeConfig, TrainerConfig
from ptq_exp.settings.schema_method import (
    NAME,
    BitsConfig,
    CalibrationConfig,
    CorrectionConfig,
    MetricConfig,
    ReconstructionConfig,
)

FULL_PRECISION = "fp32"
RULES = ("snr", "budget")
"""Rules that choose a bit schedule; anything else in `bits.schedule` is the schedule itself, or its file."""


@dataclass
class SamplerConfig:
    """How images are drawn; by default as the model was published."""

    name: str = setting("", NAME)
    solver: str = setting(
        "ddim", "Solver: `ddim` is ours, the others are those of diffusers.",
        choices="ptq_exp.diffusion.solvers.SOLVERS",
    )
    steps: int = setting(0, "Sampling steps.", low=1)
    spacing: str | None = setting(
        None, "Which of the training times are visited; null: as the model's scheduler says.",
        choices="ptq_exp.diffusion.time_grid.SPACINGS",
    )
    eta: float = setting(0.0, "Noise that a DDIM step adds: 0 = deterministic, 1 = as much as ancestral sampling.",
                         low=0, high=1)
    guidance_scale: float | None = setting(
        None, "Scale of classifier-free guidance; 1 = none, null: as the model says.", low=0
    )


@dataclass
class PublishedSampler:
    """Sampler settings of a model's publication, which `conf/sampler/*.yaml` take over."""

    steps: int = setting(20, "Sampling steps as published.")
    spacing: str | None = setting(None, "Spacing as published; null: as the folder's scheduler says.")
    eta: float = setting(0.0, "eta as published.")
    guidance_scale: float | None = setting(None, "Guidance scale as published.")


@dataclass
class ModelConfig:
    """The diffusion model and how its network is run, full-precision and quantized alike."""

    name: str = setting("", "Name under which the model is registered, and by which tables mention it.")
    checkpoint: str | None = setting(None, "File or folder of the weights; null: shipped ones.", path=True)
    dtype: str = setting("float32", "Type of the network: `float32`, `bfloat16` or `float16`.")
    ema: bool | None = setting(
        None, "Take the averaged weights (true) or those of the last step, where a checkpoint holds both."
    )
    conditions: str | None = setting(
        None, "File (npz) of what the network receives beside class labels; see docs/own_model.md.", path=True
    )
    prompts: str | None = setting(
        None, "Of a pipeline: file of prompts, one in each line, or of its arguments for each image (.json, .jsonl).",
        path=True,
    )
    call: dict[str, Any] | None = setting(None, "Of a pipeline: arguments of its call, the same for all images.")
    config: str | None = setting(
        None, "Of a pipeline in a single file: folder of its settings and tokenizers; null: the hub's cache.", path=True
    )
    component: str | None = setting(None, "Of a pipeline: what is quantized; null: `unet` or `transformer`.")
    channels_last: bool = setting(False, "Memory layout NHWC: faster convolutions on GPUs in half precision.")
    compile: bool = setting(False, "Run the network through torch.compile.")
    build: dict[str, Any] = setting(dict, "Function that makes the `DiffusionModel`, and its arguments.", path=True)
    images: dict[str, Any] | None = setting(
        None, "Function that gives the model's real images, uint8 [N, H, W, C], and its arguments.", path=True
    )
    extractor: dict[str, Any] | None = setting(
        None, "Feature extractor that suits the model's images, which `evaluation=pairs` takes.", path=True
    )
    groups: dict[str, str] = setting(
        dict, "Names for globs of layers, for `bits.groups`; the first that matches decides."
    )
    sampler: PublishedSampler = field(default_factory=PublishedSampler)


@dataclass
class EvaluationConfig:
    """How many images are drawn, and by what they are scored."""

    name: str = setting("", NAME)
    n_samples: int = setting(0, "Images that are drawn and scored.", low=2)
    batch_size: int = setting(0, "Images per network evaluation.", low=1)
    extractor: dict[str, Any] | None = setting(
        None, "Feature extractor and its arguments; null: images are only compared with the full-precision ones.",
        path=True,
    )
    weights: str | None = setting(None, "File of the extractor's weights; null: shipped or downloaded.", path=True)
    reference: Any = setting(
        None, "Real images: a path (ADM .npz, folder, CIFAR-10, saved statistics), or a function and its arguments.",
        path=True,
    )
    pairs: list[str] = setting(
        list, "Scores of pairs of quantized and full-precision images, beside PSNR: `ssim`, `fid_to_fp`."
    )
    lpips: str | None = setting(
        None, "File of torchvision's AlexNet, VGG16 or SqueezeNet: LPIPS is measured, too; null: it is not.", path=True
    )
    clip: str | None = setting(
        None, "Folder of a CLIP model of transformers: the CLIP score is measured, too; null: it is not.", path=True
    )
    resamples: int = setting(10000, "Resamples of the bootstrap for the 95 % intervals of means over pairs; 0: none.",
                             low=0)
    fid_resamples: int = setting(
        0, "Resamples for the intervals of changes of FID, sFID and IS, each of which is a new FID; 0: none.", low=0
    )
    gate: dict[str, float] | None = setting(
        None, "Scores that a run must reach, such as {psnr: 30}; the command ends with exit code 3 where one does not."
    )
    eps_error_samples: int = setting(0, "Trajectories on which the relative eps error per step is measured.", low=1)
    grid_images: int = setting(0, "Pairs of images in grid.png.", low=1)

    @property
    def pair_scores(self) -> list[str]:
        """Names of the scores of pairs that are measured: PSNR, what `pairs` asks for, and what has its weights."""
        given = ["lpips"] * (self.lpips is not None) + ["clip_score"] * (self.clip is not None)
        return list(dict.fromkeys(["psnr", *self.pairs, *given]))


@dataclass
class AnalysisConfig:
    """Activation ranges per step and the sensitivity of each layer, on trajectories that chose no range."""

    active: bool = setting(False, "Also measure what this section describes; results in analysis.npz and report.html.")
    layers: list[str] = setting(lambda: ["*"], "Globs of the quantized layers that are analysed.")
    n_samples: int = setting(32, "Full-precision trajectories whose activations are recorded.", low=1)
    batch_size: int = setting(16, "Trajectories side by side.", low=1)
    steps: int = setting(20, "Most steps that are recorded, evenly spread.", low=1)
    values: int = setting(256, "Values kept of each activation tensor of each trajectory.", low=1)
    sensitivity: bool = setting(True, "Also measure the error of each layer when it alone is quantized.")
    sensitivity_samples: int = setting(4, "Trajectories for the sensitivity.", low=1)
    sensitivity_steps: int = setting(10, "Most steps for the sensitivity.", low=1)


@dataclass
class LoggerConfig:
    """Weights & Biases."""

    mode: str = setting("", "`offline`: files only; `online`: the service; `none`: no W&B run.",
                        choices="ptq_exp.results.wandb.MODES")
    project: str = setting("", "W&B project.")
    entity: str | None = setting(None, "W&B user or team; null: the default one.")
    group: str | None = setting(None, "W&B group of the run.")
    tags: list[str] = setting(list, "W&B tags of the run.")


@dataclass
class SweepConfig:
    """Settings of the command, not of an experiment."""

    resume: str | None = setting(None, "Folder of a sweep whose missing and failed jobs are run, in the same folder.")


@dataclass
class ExperimentConfig:
    """One experiment, as `conf/config.yaml` composes it."""

    name: str = setting("", "Name of the run folder and of the W&B run.")
    seed: int = setting(0, "Seed of the scored images and of the calibration set.", low=0)
    imports: list[str] = setting(
        list, "Python modules to import first: they may register range metrics, sources of states and models."
    )
    forecast: bool = setting(
        False, "Only say what the run would take: seconds of each stage, memory, disk (docs/results/scale.md)."
    )
    cache: str = setting(
        "on", "Share calibration sets, images and features between runs, do without, or compute them anew.",
        choices="ptq_exp.storage.cache.MODES",
    )
    cache_dir: str = setting("", "Folder of what runs share.", path=True)
    cache_lease: float = setting(
        120.0, "Seconds without a sign of life after which other machines take over what one was computing.", low=1
    )
    save_quantized: bool = setting(True, "Leave the quantized model in the sub-folder quantized/ of the run folder.")
    quantized: str | None = setting(
        None, "Folder of a saved quantized model, which is evaluated as it is (+experiment=evaluate).", path=True
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    quantization: Policy = field(default_factory=Policy)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
