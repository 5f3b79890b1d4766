"""The schema of the composed configuration: names, types and defaults of all settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from ptq_exp.quantization.policy import Policy

FULL_PRECISION = "fp32"
RULES = ("snr", "budget")
"""Rules that choose a bit schedule; anything else in `bits.schedule` is the schedule itself, or its file."""
_PATH = {"path": True}
"""Of a setting that is a path, or whose entries may be."""


@dataclass
class SamplerConfig:
    """Solver, number of steps, their spacing, eta of DDIM, scale of classifier-free guidance (1 = none).

    None: what the model itself says.
    """

    name: str = ""
    solver: str = "ddim"
    steps: int = 0
    spacing: str | None = None
    eta: float = 0.0
    guidance_scale: float | None = None


@dataclass
class PublishedSampler:
    """Sampler settings of a model's publication, which `conf/sampler/ddim.yaml` takes over."""

    steps: int = 20
    spacing: str | None = None
    eta: float = 0.0
    guidance_scale: float | None = None


@dataclass
class ModelConfig:
    """`build` makes the `DiffusionModel`, `images` its real images (uint8 [N, H, W, C]) or None.

    `ema` chooses between the averaged weights and those of the last step, where a checkpoint holds both;
    `groups` are names for globs of layers; `channels_last` and `compile` are how denoisers
    are run, full-precision and quantized alike.
    """

    name: str = ""
    checkpoint: str | None = field(default=None, metadata=_PATH)
    dtype: str = "float32"
    ema: bool | None = None
    channels_last: bool = False
    compile: bool = False
    build: dict[str, Any] = field(default_factory=dict, metadata=_PATH)
    images: dict[str, Any] | None = field(default=None, metadata=_PATH)
    groups: dict[str, str] = field(default_factory=dict)
    sampler: PublishedSampler = field(default_factory=PublishedSampler)


@dataclass
class CalibrationConfig:
    """Source of states, distribution over time steps, how many; later `rounds` take states of the quantized model.

    `labels`: the time each state is shown with, its own or the mismatch of PTQ4DM's code.
    """

    name: str = ""
    source: str | None = None
    distribution: dict[str, Any] | None = None
    n_samples: int = 0
    batch_size: int = 0
    rounds: int = 1
    labels: str = "paired"


@dataclass
class MetricConfig:
    """Error measure of the range search."""

    name: str = ""


@dataclass
class BitsConfig:
    """Bit-widths; all None for full precision.

    With a `schedule` ("snr", "budget", a list of one width per step, or the file of one) activations have a width per
    sampling step, out of `candidates` (None for a list: the widths in it), and `activation` is None.

    `groups`: widths such as "w4a8" for groups of layers, by a name in `model.groups` or a glob; None = those above.
    `min_bops_ratio`: configurations with more bit operations than FP32 / this are infeasible.
    """

    name: str = ""
    weight: int | None = None
    activation: int | None = None
    softmax: int | None = None
    first_last: int | None = None
    boundary: int | None = None
    schedule: Any = field(default=None, metadata=_PATH)
    candidates: list[int] | None = None
    bops_ratio: float | None = None
    gain_steps: int = 20
    gain_samples: int = 64
    groups: dict[str, Any] = field(default_factory=dict)
    min_bops_ratio: float | None = None


@dataclass
class ReconstructionConfig:
    """How weight roundings and activation step sizes are learned; `granularity`: block, layer, or none."""

    name: str = ""
    granularity: str = "none"
    iterations: int = 0
    batch_size: int = 0
    lr: float = 0.0
    step_lr: float = 0.0
    weight: float = 0.0
    warmup: float = 0.0
    b_start: float = 0.0
    b_end: float = 0.0
    power: float = 2.0
    input_prob: float = 1.0
    drop_prob: float = 0.0
    inner_weight: float = 0.0
    cache_gb: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is reconstructed."""
        return self.granularity != "none"


@dataclass
class CorrectionConfig:
    """Which parts of the quantization noise are corrected, and how its statistics are fitted.

    `statistics` is a noise_statistics.npz to use instead of a fit.
    """

    name: str = ""
    correlation: bool = False
    bias: bool = False
    variance: bool = False
    convention: str = "paper"
    shrink: bool = True
    follow: str = "fp32"
    n_samples: int = 0
    batch_size: int = 0
    statistics: str | None = field(default=None, metadata=_PATH)

    @property
    def active(self) -> bool:
        """Whether anything is corrected."""
        return self.correlation or self.bias or self.variance


@dataclass
class EvaluationConfig:
    """Extractor, reference, and how many images are scored, compared and shown.

    `extractor` None: images are only compared with their full-precision twins. `reference` is a constructor of images
    or a path; `weights` belong to the extractor.
    """

    name: str = ""
    n_samples: int = 0
    batch_size: int = 0
    extractor: dict[str, Any] | None = field(default=None, metadata=_PATH)
    weights: str | None = field(default=None, metadata=_PATH)
    reference: Any = field(default=None, metadata=_PATH)
    eps_error_samples: int = 0
    grid_images: int = 0


@dataclass
class AnalysisConfig:
    """Whether a run also measures activation ranges per step and the sensitivity of each layer, and on how much.

    `layers` are globs of quantized layers; `values` are drawn of each activation tensor of each of `n_samples`
    trajectories in at most `steps` steps; the error of single layers is measured on `sensitivity_samples` of them in at
    most `sensitivity_steps`. No range was chosen on any of them.
    """

    active: bool = False
    layers: list[str] = field(default_factory=lambda: ["*"])
    n_samples: int = 32
    batch_size: int = 16
    steps: int = 20
    values: int = 256
    sensitivity: bool = True
    sensitivity_samples: int = 4
    sensitivity_steps: int = 10


@dataclass
class LoggerConfig:
    """Weights & Biases."""

    mode: str = ""
    project: str = ""
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainerConfig:
    """Device, strategy, progress bar, CPU threads."""

    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    progress_bar: bool = True
    threads: int | None = None


@dataclass
class SweepConfig:
    """Of the command, not of an experiment. `resume`: folder of a sweep whose missing and failed jobs are to be run."""

    resume: str | None = None


@dataclass
class ExperimentConfig:
    """One experiment, as `conf/config.yaml` composes it; the comments there explain the settings."""

    name: str = ""
    seed: int = 0
    imports: list[str] = field(default_factory=list)
    cache: str = "on"
    cache_dir: str = field(default="", metadata=_PATH)
    save_quantized: bool = True
    quantized: str | None = field(default=None, metadata=_PATH)
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    quantization: Policy = field(default_factory=Policy)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def setting_names(schema: type = ExperimentConfig) -> list[str]:
    """Every setting of the schema, dotted: "name", "sampler.eta", ..."""
    return list(setting_types(schema))


@cache
def setting_types(schema: type = ExperimentConfig) -> dict[str, Any]:
    """Every setting of the schema, dotted, and the type that it is declared with."""
    return {name: hint for name, hint, _ in _settings(schema)}


def path_settings() -> list[str]:
    """Settings that are paths, or whose entries may be: `~` in them is the home folder."""
    return [name for name, _, setting in _settings(ExperimentConfig) if setting.metadata.get("path")]


def _settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    hints = get_type_hints(schema)
    for setting in fields(schema):
        hint = hints[setting.name]
        if is_dataclass(hint):
            yield from _settings(hint, f"{prefix}{setting.name}.")
        else:
            yield f"{prefix}{setting.name}", hint, setting
