"""Rules as plain values for JSON, and back; also as saved models of version 1 have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ptq_exp.quantization import granularity
from ptq_exp.quantization.specs import QuantSpec, Rule, TensorSpec


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain values for JSON; `rule_from_dict` makes the same rule of it."""
    spec = rule.spec
    if spec is not None:
        values = {field.name: getattr(spec, field.name) for field in fields(spec)}
        spec = {role: _to_plain(value) if isinstance(value, TensorSpec) else value for role, value in values.items()}
    return {"pattern": rule.pattern, "spec": spec, "reason": rule.reason}


def rule_from_dict(plain: Mapping[str, Any]) -> Rule:
    """Return the rule that `rule_to_dict` described, or a saved model of version 1.

    Raises:
        KeyError, TypeError, ConfigError: it described something else.
    """
    spec = plain["spec"]
    if spec is not None:
        spec = QuantSpec(**{role: _tensor_spec(value) for role, value in spec.items()})
    return Rule(plain["pattern"], spec, plain["reason"])


def _to_plain(spec: TensorSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    bits = list(spec.bits) if isinstance(spec.bits, tuple) else spec.bits
    if spec.dynamic is None:
        del values["dynamic"]
    return values | {"bits": bits, "granularity": granularity.to_plain(spec.granularity)}


def _tensor_spec(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    if isinstance(values["granularity"], str):
        kind, segments, size = (values.pop(key, None) for key in ("granularity", "segments", "group_size"))
        values["granularity"] = granularity.from_version_1(kind, segments, size)
    else:
        values["granularity"] = granularity.from_plain(values["granularity"])
    return TensorSpec(**values)
