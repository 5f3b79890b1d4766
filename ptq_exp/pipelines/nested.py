"""Arguments by name, nested ones as one level: `added_cond_kwargs.text_embeds`, `down_block_additional_residuals.0`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def bound_arguments(forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of `forward` by their names."""
    signature = inspect.signature(forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested arguments as one level, names joined by dots; see `nested` for the way back.

    Empty containers, lists without tensors, and dicts with other keys than names stay as they are.
    """
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        inner = _items(value)
        flat |= flattened(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def containers_of(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, type]:
    """Return the type (dict, list or tuple) of each container that `flattened` takes apart; outer ones come first."""
    found: dict[str, type] = {}
    for name, value in arguments.items():
        if inner := _items(value):
            found[f"{prefix}{name}"] = dict if isinstance(value, dict) else type(value)
            found |= containers_of(inner, f"{prefix}{name}.")
    return found


def nested(flat: Mapping[str, Any], containers: Mapping[str, type]) -> dict[str, Any]:
    """Return the arguments that `flattened` was given."""
    whole = dict(flat)
    for name in reversed(list(containers)):  # inner ones first
        prefix = f"{name}."
        inner = {key.removeprefix(prefix): whole.pop(key) for key in list(whole) if key.startswith(prefix)}
        kind = containers[name]
        whole[name] = inner if kind is dict else kind(inner[key] for key in sorted(inner, key=int))
    return whole


def _items(value: Any) -> Mapping[str, Any]:
    """Return what a container holds by name; {} of anything else."""
    if isinstance(value, dict):
        return value if all(isinstance(key, str) and key and "." not in key for key in value) else {}
    if type(value) in (list, tuple) and any(isinstance(item, (Tensor, dict, list, tuple)) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return {}
