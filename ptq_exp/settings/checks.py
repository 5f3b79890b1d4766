"""Refuse values out of bounds and settings that contradict each other, in one line that names setting and fix."""

from __future__ import annotations

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import group_bits, transforms_of
from ptq_exp.quantization.ranges.range_search import check_metric
from ptq_exp.quantization.widths import LAYER_BITS, SOFTMAX_BITS, check_bits, check_width
from ptq_exp.runtime import runtime_of
from ptq_exp.settings.check_budget import check_budget
from ptq_exp.settings.check_dynamic import check_dynamic
from ptq_exp.settings.check_formats import check_formats
from ptq_exp.settings.check_scores import check_scores
from ptq_exp.settings.field import check_section
from ptq_exp.settings.schema import FULL_PRECISION, RULES, BitsConfig, ExperimentConfig
from ptq_exp.settings.schema_machine import RuntimeConfig


def check(config: ExperimentConfig) -> None:
    """Raise ConfigError at the first impossible or contradictory setting."""
    check_section("", config)
    for name in ("logger", "sampler", "evaluation", "trainer"):
        check_section(name, getattr(config, name))
    reference = config.evaluation.reference
    if reference is not None and not (isinstance(reference, dict | str) and reference):
        raise ConfigError(f"evaluation.reference={reference!r}: give a path, or null where nothing is compared")
    if config.model.ema is not None and "ema" not in config.model.build:
        raise ConfigError(f"model.ema: a checkpoint of model={config.model.name} has one set of weights, not two")
    if config.model.conditions is not None and "conditions" not in config.model.build:
        raise ConfigError(f"model.conditions: model={config.model.name} takes none but its own; set it to null")
    for name in ("prompts", "call", "config", "component"):
        if getattr(config.model, name) is not None and name not in config.model.build:
            raise ConfigError(f"model.{name}: model={config.model.name} is no pipeline; set it to null")
    if config.evaluation.extractor is not None and reference is None and not config.evaluation.pairs:
        raise ConfigError(
            f"evaluation.reference is not set, but evaluation={config.evaluation.name} compares with real images: give "
            "an ADM .npz file, a folder of images, a folder of CIFAR-10's python files, or saved statistics"
        )
    check_scores(config)
    _check_runtime(config)
    _check_analysis(config)
    if config.bits.name == FULL_PRECISION:
        _check_full_precision(config)
    else:
        _check_quantization(config)
        check_budget(config)
        _check_bits(config.bits)
        _check_groups(config)
        check_formats(config)
        _check_reconstruction(config)
        _check_correction(config)


def _check_analysis(config: ExperimentConfig) -> None:
    analysis = config.analysis
    check_section("analysis", analysis)
    if not analysis.active:
        return
    if config.bits.name == FULL_PRECISION:
        raise ConfigError("analysis.active=true looks at quantized layers, but bits=fp32 has none: choose bits=w8a8")
    if config.quantization.transforms:
        raise ConfigError(
            "analysis.active=true switches layers between full precision and quantized, which transforms rule out, as "
            "they change several layers together: set quantization.transforms=[] and quantization.smooth=false"
        )


def _check_full_precision(config: ExperimentConfig) -> None:
    settings = ("weight", "activation", "softmax", "first_last", "boundary", "schedule")
    given = [key for key in settings if getattr(config.bits, key) is not None]
    given += [f"groups.{key}" for key, bits in config.bits.groups.items() if bits is not None]
    if given:
        raise ConfigError(f"bits.{given[0]} is set, but bits=fp32 quantizes nothing: choose bits=w8a8 or another")
    if config.calibration.name != "none":
        raise ConfigError(
            f"calibration={config.calibration.name} contradicts bits=fp32, which quantizes nothing: "
            "add calibration=none, or use +experiment=fp32"
        )
    if config.reconstruction.active:
        raise ConfigError(f"reconstruction={config.reconstruction.name} contradicts bits=fp32, which quantizes nothing")
    if config.correction.active:
        raise ConfigError(f"correction={config.correction.name} contradicts bits=fp32, which has no noise to correct")


def _check_quantization(config: ExperimentConfig) -> None:
    bits, calibration = config.bits, config.calibration
    check_section("metric", config.metric)
    check_metric(config.metric.name)
    _check_placement(config)
    check_dynamic(config)
    if calibration.source is None:
        return
    check_section("calibration", calibration)
    if calibration.rounds > 1 and calibration.source != "denoise":
        raise ConfigError(
            f"calibration.rounds={calibration.rounds}: states of calibration.source={calibration.source} are the same "
            "for a quantized model; choose calibration.source=denoise, or calibration.rounds=1"
        )
    if calibration.rounds > 1 and bits.schedule is not None:
        raise ConfigError(
            f"calibration.rounds={calibration.rounds} contradicts bits.schedule, which is decided after calibration: "
            "choose calibration.rounds=1"
        )
    _check_labels(config)


def _check_labels(config: ExperimentConfig) -> None:
    calibration, temporal = config.calibration, config.quantization.temporal
    if calibration.labels == "paired":
        return
    if calibration.source != "denoise":
        raise ConfigError(
            f"calibration.labels={calibration.labels} is about states of denoising runs, but "
            f"calibration.source={calibration.source}: choose calibration.source=denoise, or calibration.labels=paired"
        )
    if temporal != "static":
        raise ConfigError(
            f"calibration.labels={calibration.labels} contradicts quantization.temporal={temporal}: "
            "a state with a wrong time belongs to no step's ranges; choose quantization.temporal=static, or "
            "calibration.labels=paired"
        )


def _check_placement(config: ExperimentConfig) -> None:
    quantization = config.quantization
    check_section("quantization", quantization)
    transforms_of(quantization.transforms)
    if quantization.temporal == "binned" and quantization.temporal_bins > config.sampler.steps:
        raise ConfigError(
            f"quantization.temporal_bins={quantization.temporal_bins}: choose 1..{config.sampler.steps} (sampler.steps)"
        )
    if quantization.temporal != "static" and config.bits.schedule is not None:
        raise ConfigError(
            f"quantization.temporal={quantization.temporal} contradicts bits.schedule: a step chooses either its "
            "ranges or its width; choose quantization.temporal=static, or one width such as bits=w8a8"
        )


def _check_bits(bits: BitsConfig) -> None:
    check_width("bits.weight", bits.weight)
    check_bits("bits.softmax", bits.softmax, SOFTMAX_BITS)
    check_bits("bits.first_last", bits.first_last)
    check_bits("bits.boundary", bits.boundary, SOFTMAX_BITS)
    if bits.schedule is None:
        check_width("bits.activation", bits.activation, activation=True)
        return
    if isinstance(bits.weight, str):
        raise ConfigError(
            f"bits.weight={bits.weight}: with bits.schedule weights are integers: choose {LAYER_BITS[0]}.."
            f"{LAYER_BITS[1]}, or bits without a schedule"
        )
    if not isinstance(bits.schedule, str | list):
        raise ConfigError(f"bits.schedule={bits.schedule}: give snr, budget, a list of one width per step, or its file")
    if bits.activation is not None:
        raise ConfigError(f"bits.activation={bits.activation} contradicts bits.schedule: set bits.candidates instead")
    for width in bits.candidates or ():
        check_bits("bits.candidates", width)
    if bits.schedule in RULES and len(set(bits.candidates or ())) < 2:
        raise ConfigError(f"bits.candidates={bits.candidates}: give two or more widths to choose from, such as [4,8]")
    if bits.schedule == "budget":
        if bits.bops_ratio is None or bits.bops_ratio <= 1:
            raise ConfigError(f"bits.bops_ratio={bits.bops_ratio}: say how many times fewer bit operations than FP32")
        _at_least("bits.gain_steps", bits.gain_steps, 2)
        _at_least("bits.gain_samples", bits.gain_samples, 1)


def _check_groups(config: ExperimentConfig) -> None:
    bits = config.bits
    given = {key: value for key, value in bits.groups.items() if value is not None}
    for key, value in given.items():
        group_bits(f"bits.groups.{key}", value)
        if key not in config.model.groups and not set("*?[.") & set(key):
            raise ConfigError(
                f"bits.groups.{key}: model={config.model.name} has no such group; choose one of "
                f"{', '.join(config.model.groups) or 'none'}, or give a glob such as *conv1"
            )
    if bits.min_bops_ratio is not None and bits.min_bops_ratio < 1:
        raise ConfigError(f"bits.min_bops_ratio={bits.min_bops_ratio}: choose 1 or more, times fewer BOPs than FP32")
    for setting, value in (("groups", given), ("min_bops_ratio", bits.min_bops_ratio)):
        if value and bits.schedule is not None:
            raise ConfigError(
                f"bits.{setting}={value} contradicts bits.schedule, which has a width per step and its own budget: "
                "choose bits without a schedule"
            )


def _check_reconstruction(config: ExperimentConfig) -> None:
    settings = config.reconstruction
    check_section("reconstruction", settings)
    if not settings.active:
        return
    _at_least("reconstruction.b_start", settings.b_start, settings.b_end)
    _at_least("calibration.n_samples", config.calibration.n_samples, 2)
    if settings.step_lr and config.bits.schedule is not None:
        raise ConfigError(
            f"reconstruction.step_lr={settings.step_lr} learns one step size for all sampling steps, but bits.schedule "
            "changes the width between them: set reconstruction.step_lr=0, or choose bits without a schedule"
        )


def _check_runtime(config: ExperimentConfig) -> None:
    runtime = config.runtime
    check_section("runtime", runtime)
    if runtime != RuntimeConfig() and runtime.engine is None:
        changed = next(key for key, value in vars(runtime).items() if value != getattr(RuntimeConfig(), key))
        raise ConfigError(f"runtime.{changed} is an option of engines: choose runtime=openvino, or leave it out")
    if runtime.compare not in (None, runtime.engine) or runtime.compare == "simulate":
        raise ConfigError(
            f"runtime.compare={runtime.compare}: choose an engine, such as openvino, that runtime=simulate is compared "
            "with; an engine that draws the images is compared anyway"
        )
    if config.trainer.cuda_graph and runtime.name == "openvino":
        raise ConfigError(
            "trainer.cuda_graph=true: runtime=openvino computes on the CPU: set trainer.cuda_graph=false, or choose "
            "runtime=torch"
        )
    # an engine that is not installed is reported before hours are spent
    runtime_of(runtime.name, runtime.options)
    if runtime.engine is not None:
        runtime_of(runtime.engine, runtime.engine_options)


def _check_correction(config: ExperimentConfig) -> None:
    correction = config.correction
    check_section("correction", correction)
    if correction.statistics is not None and not correction.active:
        raise ConfigError("correction.statistics is set, but correction=none corrects nothing: choose correction=ptqd")
    if correction.fit == "trajectory":
        for setting, value, only in (
            ("variance", correction.variance, False), ("convention", correction.convention, "paper"),
            ("follow", correction.follow, "fp32"),
        ):
            if value != only:
                raise ConfigError(
                    f"correction.{setting}={str(value).lower()} belongs to correction.fit=estimates: leave it out, or "
                    "choose correction=ptqd"
                )


def _at_least(setting: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{setting}={value}: choose {least} or more")
