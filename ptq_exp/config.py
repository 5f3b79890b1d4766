"""The schema of the composed configuration: unknown keys, wrong types and impossible values end here."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ptq_exp
from ptq_exp.calibration import SOURCES
from ptq_exp.diffusion.time_grid import SPACINGS
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import METRICS
from ptq_exp.quantization.rules import SOFTMAX_BITS, check_bits
from ptq_exp.tracking.cache import MODES as CACHE_MODES
from ptq_exp.tracking.wandb_run import MODES as LOGGER_MODES

FULL_PRECISION = "fp32"


@dataclass
class SamplerConfig:
    """Number of steps, their spacing, eta of DDIM, scale of classifier-free guidance (1 = none).

    None: what the model itself says.
    """

    name: str = ""
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
    `channels_last` and `compile` are how denoisers are run, full-precision and quantized alike.
    """

    name: str = ""
    checkpoint: str | None = None
    dtype: str = "float32"
    ema: bool | None = None
    channels_last: bool = False
    compile: bool = False
    build: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] | None = None
    sampler: PublishedSampler = field(default_factory=PublishedSampler)


@dataclass
class CalibrationConfig:
    """Source of states, distribution over time steps, how many."""

    name: str = ""
    source: str | None = None
    distribution: dict[str, Any] | None = None
    n_samples: int = 0
    batch_size: int = 0


@dataclass
class MetricConfig:
    """Error measure of the range search."""

    name: str = ""


@dataclass
class BitsConfig:
    """Bit-widths; all None for full precision."""

    name: str = ""
    weight: int | None = None
    activation: int | None = None
    softmax: int | None = None
    first_last: int | None = None
    boundary: int | None = None


@dataclass
class QuantizationConfig:
    """Which operations are quantized, granularity and symmetry.

    `first`, `last` and `keep_fp` are globs; None = the first and last layers that the model names.
    """

    name: str = ""
    attention: bool = True
    weight_symmetric: bool = False
    weight_granularity: str = "channel"
    activation_symmetric: bool = False
    first: list[str] | None = None
    last: list[str] | None = None
    keep_fp: list[str] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """Extractor, reference, and how many images are scored, compared and shown.

    `extractor` None: images are only compared with their full-precision twins. `reference` is a constructor of images
    or a path; `weights` belong to the extractor.
    """

    name: str = ""
    n_samples: int = 0
    batch_size: int = 0
    extractor: dict[str, Any] | None = None
    weights: str | None = None
    reference: Any = None
    eps_error_samples: int = 0
    grid_images: int = 0


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
class ExperimentConfig:
    """One experiment, as `conf/config.yaml` composes it; the comments there explain the settings."""

    name: str = ""
    seed: int = 0
    cache: str = "on"
    cache_dir: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def run_name(calibration: str, bits: str) -> str:
    """`<calibration>_<bits>`, or `fp32` alone for the full-precision model."""
    return FULL_PRECISION if bits == FULL_PRECISION else f"{calibration}_{bits}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def config_folder() -> Path:
    """Absolute path of `conf/`: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: neither is there; the installation is incomplete.
    """
    package = Path(ptq_exp.__file__).parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ConfigError(f"no conf/config.yaml beside or inside {package}: install ptq-exp again")


def validated(composed: DictConfig) -> ExperimentConfig:
    """Check the composed configuration against the schema and its values, and return it as plain objects.

    Raises:
        ConfigError: one line that names the setting, what was found and what is valid.
    """
    try:
        # only this order of merging refuses `+group.extra=1`
        merged = OmegaConf.merge(
            OmegaConf.structured(ExperimentConfig()), OmegaConf.to_container(composed, resolve=True)
        )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_schema_message(error)) from error
    _check(config)
    return config


def _schema_message(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    first_line = str(error).splitlines()[0]
    parent = error.parent_node
    if "not in" in first_line and isinstance(parent, DictConfig):
        return f"{key}: no such setting; {nearest(key.rsplit('.', 1)[-1], [str(k) for k in parent])}"
    return f"{key}: {first_line}"


def nearest(word: str, valid: list[str]) -> str:
    """`did you mean 'x'?` if something is near, else the list of valid words."""
    near = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid))}"


def _check(config: ExperimentConfig) -> None:
    """Values that no type can rule out."""
    _at_least("seed", config.seed, 0)
    _one_of("cache", config.cache, CACHE_MODES)
    _one_of("logger.mode", config.logger.mode, LOGGER_MODES)
    _at_least("sampler.steps", config.sampler.steps, 1)
    if config.sampler.spacing is not None:
        _one_of("sampler.spacing", config.sampler.spacing, SPACINGS)
    _between("sampler.eta", config.sampler.eta, 0, 1)
    if config.sampler.guidance_scale is not None:
        _at_least("sampler.guidance_scale", config.sampler.guidance_scale, 0)
    _at_least("evaluation.n_samples", config.evaluation.n_samples, 2)
    _at_least("evaluation.batch_size", config.evaluation.batch_size, 1)
    _at_least("evaluation.eps_error_samples", config.evaluation.eps_error_samples, 1)
    _at_least("evaluation.grid_images", config.evaluation.grid_images, 1)
    _at_least("trainer.devices", config.trainer.devices, 1)
    if config.trainer.threads is not None:
        _at_least("trainer.threads", config.trainer.threads, 1)
    if config.model.ema is not None and "ema" not in config.model.build:
        raise ConfigError(f"model.ema: a checkpoint of model={config.model.name} has one set of weights, not two")
    if config.evaluation.extractor is not None and config.evaluation.reference is None:
        raise ConfigError(
            f"evaluation.reference is not set, but evaluation={config.evaluation.name} compares with real images: give "
            "an ADM .npz file, a folder of images, a folder of CIFAR-10's python files, or saved statistics"
        )
    if config.bits.name == FULL_PRECISION:
        _check_full_precision(config)
    else:
        _check_quantization(config)


def _check_full_precision(config: ExperimentConfig) -> None:
    widths = {key: bits for key, bits in asdict(config.bits).items() if key != "name"}
    given = [key for key, bits in widths.items() if bits is not None]
    if given:
        raise ConfigError(f"bits.{given[0]} is set, but bits=fp32 quantizes nothing: choose bits=w8a8 or another")
    if config.calibration.name != "none":
        raise ConfigError(
            f"calibration={config.calibration.name} contradicts bits=fp32, which quantizes nothing: "
            "add calibration=none, or use +experiment=fp32"
        )


def _check_quantization(config: ExperimentConfig) -> None:
    bits, calibration = config.bits, config.calibration
    check_bits("bits.weight", bits.weight)
    check_bits("bits.activation", bits.activation)
    check_bits("bits.softmax", bits.softmax, SOFTMAX_BITS)
    check_bits("bits.first_last", bits.first_last)
    check_bits("bits.boundary", bits.boundary, SOFTMAX_BITS)
    _one_of("metric.name", config.metric.name, METRICS)
    _one_of("quantization.weight_granularity", config.quantization.weight_granularity, ("channel", "tensor"))
    if calibration.source is None:
        raise ConfigError(f"calibration={calibration.name} has no samples, but bits={bits.name} needs some to choose "
                          "activation ranges: choose calibration=ndtc or another")  # fmt: skip
    _one_of("calibration.source", calibration.source, tuple(SOURCES))
    _at_least("calibration.n_samples", calibration.n_samples, 1)
    _at_least("calibration.batch_size", calibration.batch_size, 1)


def _at_least(setting: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{setting}={value}: choose {least} or more")


def _between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{setting}={value}: choose {low}..{high}")


def _one_of(setting: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{setting}={value}: choose one of {', '.join(valid)}")


def build(node: dict[str, Any], setting: str, **extra: Any) -> Any:
    """Call the constructor that `node["_target_"]` names with the node's other entries as plain arguments.

    Raises:
        ConfigError: there is no such constructor, or it has no argument of that name.
    """
    arguments = {key: value for key, value in node.items() if key != "_target_"} | extra
    try:
        target = get_object(node["_target_"])
    except (KeyError, ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}._target_={node.get('_target_')}: no such function or class ({error})") from error
    parameters = inspect.signature(target).parameters
    valid = list(parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in valid and not open_ended:
            raise ConfigError(f"{setting}.{key}: {node['_target_']} has no such argument; {nearest(key, valid)}")
    return target(**arguments)
