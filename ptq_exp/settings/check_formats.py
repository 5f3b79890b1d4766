"""Refuse settings that contradict number formats, or activations that are not quantized."""

from __future__ import annotations

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import group_bits
from ptq_exp.quantization.widths import UNQUANTIZED
from ptq_exp.settings.schema import ExperimentConfig


def check_formats(config: ExperimentConfig) -> None:
    """Raise ConfigError at the first setting that cannot go with the formats of weights and activations."""
    bits, quantization = config.bits, config.quantization
    if bits.activation == UNQUANTIZED:
        _check_unquantized(config)
    if isinstance(bits.weight, str) and quantization.weight_granularity == "group" and _has_blocks(bits.weight):
        raise ConfigError(
            f"quantization.weight_granularity=group contradicts bits.weight={bits.weight}, which has blocks of its "
            "own: choose quantization.weight_granularity=channel"
        )
    sides = ("weight", "activation")
    named = [(f"bits.{side}", getattr(bits, side), side) for side in sides]
    for key, value in bits.groups.items():
        if value is not None:
            pair = group_bits(f"bits.groups.{key}", value)
            named += [(f"bits.groups.{key}", part, side) for part, side in zip(pair, sides, strict=True)]
    formats = [(setting, value, key) for setting, value, key in named if isinstance(value, str)]
    _check_reconstruction(config, formats)
    if isinstance(bits.activation, str) and config.runtime.engine is not None:
        raise ConfigError(
            f"bits.activation={bits.activation} is a number format, which runtime={config.runtime.engine} cannot "
            "execute (simulated only): choose runtime=simulate without runtime.compare, or a width such as 8"
        )


def _check_reconstruction(config: ExperimentConfig, formats: list[tuple[str, str, str]]) -> None:
    """Check what is learned about operands in `formats`, (setting, format, "weight" or "activation")."""
    from ptq_exp.quantization.formats import FORMATS, CodebookFormat

    method = config.reconstruction
    name = f"reconstruction={method.name}"
    for setting, value, side in formats if method.active else ():
        if side == "weight" and method.method != "gptq":
            raise ConfigError(
                f"{name} learns roundings of integers, but {setting}={value} is a number format: choose "
                "reconstruction=gptq or none, or a width such as 4"
            )
        if side == "weight" and isinstance(FORMATS[value], CodebookFormat):
            raise ConfigError(
                f"{name} chooses among levels that all rows share, but those of {setting}={value} are each row's own: "
                "choose reconstruction=none, or another format"
            )
        if side == "activation" and method.step_lr:
            raise ConfigError(
                f"reconstruction.step_lr={method.step_lr} learns step sizes of integers, but {setting}={value} is a "
                "number format: set reconstruction.step_lr=0"
            )


def _check_unquantized(config: ExperimentConfig) -> None:
    """Check what needs quantized activations, where there are none."""
    quantization, bits = config.quantization, config.bits
    wanted = {
        "quantization.temporal": quantization.temporal != "static", "quantization.quantize_state":
        quantization.quantize_state, "quantization.quantize_output": quantization.quantize_output,
    }
    wanted |= {
        f"bits.groups.{key}": value is not None and group_bits(f"bits.groups.{key}", value)[1] != UNQUANTIZED
        for key, value in bits.groups.items()
    }
    for setting, asked in wanted.items():
        if asked:
            raise ConfigError(
                f"{setting} is about quantized activations, but bits.activation={UNQUANTIZED} leaves them as they are: "
                f"leave {setting} out, or choose a width or number format for activations"
            )


def _has_blocks(name: str) -> bool:
    from ptq_exp.quantization.formats import FORMATS, BlockFormat

    return isinstance(FORMATS[name], BlockFormat)
