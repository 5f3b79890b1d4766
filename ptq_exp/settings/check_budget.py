"""Refuse budgets of bits=auto that say nothing, or that contradict other settings."""

from __future__ import annotations

import math

from ptq_exp.errors import ConfigError, nearest
from ptq_exp.quantization import group_bits
from ptq_exp.settings.field import settings_of
from ptq_exp.settings.schema import ExperimentConfig

BUDGETS = ("size_mb", "bops_ratio", "latency_ms")
SIZES = ("sensitivity_samples", "sensitivity_steps", "solutions", "solution_samples")


def check_budget(config: ExperimentConfig) -> None:
    """Raise ConfigError at the first setting of bits=auto that is impossible, or contradicts another one."""
    bits = config.bits
    for name, value in bits.budget.items():
        if name not in BUDGETS:
            raise ConfigError(f"bits.budget.{name}: no such budget; {nearest(name, BUDGETS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and value > 0):
            raise ConfigError(f"bits.budget.{name}={value}: give a number above 0")
    if not bits.limits:
        if bits.budget and config.quantized is None:
            raise ConfigError(f"bits={bits.name} needs a budget: bits.budget.size_mb=1.2 (megabytes of weights) or "
                              "bits.budget.bops_ratio=25 (FP32 over these)")
        return
    for name, known in settings_of(bits):
        if name in SIZES:
            known.check(f"bits.{name}", getattr(bits, name))
    _check_candidates(bits.candidates)
    _check_contradictions(config)


def _check_candidates(candidates: list[str] | None) -> None:
    if not candidates or len(set(map(str, candidates))) < max(2, len(candidates)):
        raise ConfigError(f"bits.candidates={candidates}: give two or more to choose from, each once, such as "
                          "[w8a8,w4a8]")
    for candidate in candidates:
        group_bits("bits.candidates", candidate)


def _check_contradictions(config: ExperimentConfig) -> None:
    bits = config.bits
    if bits.schedule is not None:
        raise ConfigError("bits.budget contradicts bits.schedule: widths change with the layer or with the step; use "
                          "bits=auto or bits=step_budget as they are")
    if bits.min_bops_ratio is not None:
        raise ConfigError(f"bits.min_bops_ratio={bits.min_bops_ratio} contradicts bits.budget: set "
                          f"bits.budget.bops_ratio={bits.min_bops_ratio:g} instead")
    if config.quantization.activation_site != "input":
        raise ConfigError(f"quantization.activation_site={config.quantization.activation_site}: a layer then reads "
                          "what another one quantized, so that bits=auto cannot choose for each: choose input")
    if "latency_ms" in bits.limits and config.runtime.name == "simulate":
        raise ConfigError("bits.budget.latency_ms is measured on an engine, and runtime=simulate is none: choose "
                          "runtime=openvino, or bits.budget.size_mb")
