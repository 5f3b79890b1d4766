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
    named = [(f"bits.{key}", getattr(bits, key)) for key in ("weight", "activation")]
    for key, value in bits.groups.items():
        if value is not None:
            named += [(f"bits.groups.{key}", part) for part in group_bits(f"bits.groups.{key}", value)]
    formats = [(setting, value) for setting, value in named if isinstance(value, str)]
    if formats and config.reconstruction.active:
        setting, value = formats[0]
        raise ConfigError(
            f"reconstruction={config.reconstruction.name} learns roundings of integers, but {setting}={value} is a "
            "number format: choose reconstruction=none, or a width such as 4"
        )
    if isinstance(bits.activation, str) and config.runtime.engine is not None:
        raise ConfigError(
            f"bits.activation={bits.activation} is a number format, which runtime={config.runtime.engine} cannot "
            "execute (simulated only): choose runtime=simulate without runtime.compare, or a width such as 8"
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
