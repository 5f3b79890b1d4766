"""Refuse settings that contradict activation ranges which follow the data, or a calibration without samples."""

from __future__ import annotations

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import group_bits, transforms_of
from ptq_exp.quantization.widths import UNQUANTIZED
from ptq_exp.settings.schema import ExperimentConfig


def check_dynamic(config: ExperimentConfig) -> None:
    """Raise ConfigError at the first setting that cannot go with dynamic ranges, or with calibration=none."""
    activation = config.quantization.activation
    if activation != "static":
        _check_dynamic(config, f"quantization.activation={activation}")
    if config.calibration.source is None:
        _check_without_samples(config)


def _check_dynamic(config: ExperimentConfig, dynamic: str) -> None:
    quantization, runtime = config.quantization, config.runtime
    if quantization.temporal != "static":
        raise ConfigError(
            f"quantization.temporal={quantization.temporal} gives steps calibrated ranges of their own, but with "
            f"{dynamic} nothing is calibrated: choose quantization.temporal=static"
        )
    if config.bits.schedule is not None:
        raise ConfigError(
            f"bits.schedule contradicts {dynamic}, whose activations have one width: choose bits without a schedule, "
            "or quantization.activation=static"
        )
    if config.reconstruction.step_lr:
        raise ConfigError(
            f"reconstruction.step_lr={config.reconstruction.step_lr} learns calibrated step sizes, which {dynamic} has "
            "not: set reconstruction.step_lr=0"
        )
    if runtime.engine is not None:
        raise ConfigError(
            f"{dynamic} is simulated only (dynamic ranges): choose runtime=simulate without runtime.compare, or "
            "quantization.activation=static"
        )


def _check_without_samples(config: ExperimentConfig) -> None:
    calibration, bits, quantization = config.calibration, config.bits, config.quantization
    none = f"calibration={calibration.name} has no samples, but"
    if (quantization.activation == "static" and bits.activation != UNQUANTIZED) or _needs_data(config):
        raise ConfigError(
            f"{none} bits={bits.name} needs some to choose activation ranges: choose calibration=ndtc or another, or "
            "ranges that follow the data, such as quantization.activation=dynamic_token with integer widths"
        )
    needed = {
        f"reconstruction={config.reconstruction.name}": ("reconstruction=none", config.reconstruction.active),
        **{f"quantization.transforms: {transform.name}": (f"leave {transform.name} out", transform.uses_data)
           for transform in transforms_of(quantization.transforms)},
        f"quantization.time_layers={quantization.time_layers}": (
            "quantization.time_layers=calibration_set", quantization.time_layers != "calibration_set"
        ),
        f"calibration.rounds={calibration.rounds}": ("calibration.rounds=1", calibration.rounds > 1),
    }
    for setting, (instead, asked) in needed.items():
        if asked:
            raise ConfigError(f"{none} {setting} needs some: choose calibration=uniform or another, or {instead}")


def _needs_data(config: ExperimentConfig) -> bool:
    """Whether an activation has a number format whose scale for the tensor is calibrated."""
    from ptq_exp.quantization.formats import FORMATS

    given = [config.bits.activation, *(group_bits(key, bits)[1] for key, bits in config.bits.groups.items() if bits)]
    return any(isinstance(bits, str) and getattr(FORMATS[bits], "tensor_scale", False) for bits in given)
