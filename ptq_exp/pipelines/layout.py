"""`CallLayout`: how a component of a pipeline is called, and the same call as state, time and conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptq_exp.diffusion.call import Call
from ptq_exp.errors import ConfigError

STATES = ("sample", "hidden_states", "x", "latents")
TIMES = ("timestep", "timesteps", "t", "time")
"""Names that components of diffusers have for the state and for the time."""


@dataclass(frozen=True)
class CallLayout:
    """The arguments of a component, apart by what they are.

    Nested arguments have names with dots: `added_cond_kwargs.text_embeds`, `down_block_additional_residuals.0`.

    Attributes:
        state, time: names of the arguments that hold them; None = the network has no time.
        time_dtype: type of the time that the component expects; None = a number of Python.
        conditions: {name: type} of the tensors with a row for each row of the state.
        constants: {name: value} of all else, the same in every call.
        nested: {name of a nested argument: its type, dict, list or tuple}.
        state_dtype: type of the state.
    """

    state: str
    time: str | None
    time_dtype: torch.dtype | None
    conditions: Mapping[str, torch.dtype]
    constants: Mapping[str, Any]
    nested: Mapping[str, type]
    state_dtype: torch.dtype
    known: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, one: Mapping[str, Any], two: Mapping[str, Any]) -> CallLayout:
        """Find the layout from the arguments of two calls, those for two images twice as many rows as those for one.

        Raises:
            ConfigError: there is no state or no time among the arguments, or the state has no row per image.
        """
        state, time = _named(one, STATES, "state"), _named(one, TIMES, "time")
        rows, more = len(one[state]), len(two[state])
        if more != 2 * rows:
            raise ConfigError(
                f"the pipeline calls its network with {rows} rows for one image and {more} for two: only pipelines "
                "that evaluate all images of a call together can be quantized"
            )
        other = flattened(two)

        def has_rows(name: str, value: Any) -> bool:
            return _has_rows(value, rows) and _has_rows(other.get(name), more)

        return cls._of(one, state, time, has_rows)

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any]) -> CallLayout:
        """Find the layout of one call: every tensor as long as the state has its rows.

        Raises:
            ConfigError: there is no state among the arguments.
        """
        state = _named(arguments, STATES, "state", or_tensor=True)
        time = next((name for name in TIMES if name in arguments), None)
        rows = len(arguments[state])
        return cls._of(arguments, state, time, lambda _, value: _has_rows(value, rows))

    @classmethod
    def _of(
        cls, arguments: Mapping[str, Any], state: str, time: str | None, has_rows: Callable[[str, Any], bool]
    ) -> CallLayout:
        flat = flattened(arguments)
        rest = {name: value for name, value in flat.items() if name not in (state, time)}
        conditions = {name: value.dtype for name, value in rest.items() if has_rows(name, value)}
        constants = {name: value for name, value in rest.items() if name not in conditions}
        if "return_dict" in constants:
            constants["return_dict"] = False
        at = None if time is None else arguments[time]
        return cls(
            state, time, at.dtype if isinstance(at, Tensor) else None, conditions, constants, _containers(arguments),
            arguments[state].dtype, frozenset(flat),
        )

    def call(self, arguments: Mapping[str, Any]) -> Call:
        """Return the call that `arguments` of the component make.

        Raises:
            ConfigError: an argument that never was there before, or one that is no tensor of rows and has changed.
        """
        flat = {name: value for name, value in flattened(arguments).items() if name != "return_dict"}
        for name, value in flat.items():
            if name not in self.known or (name in self.constants and not _same(value, self.constants[name])):
                raise ConfigError(
                    f"the pipeline calls its network with another {name} than at first: what changes from call to call "
                    "must be a tensor with a row for each row of the state"
                )
        x = arguments[self.state]
        time = 0.0 if self.time is None else arguments[self.time]
        t = torch.as_tensor(time, device=x.device).float().reshape(-1).expand(len(x))
        return Call(x, t, {name: flat[name] for name in self.conditions})

    def arguments(self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of the component for a call, in the types that it expects."""
        flat: dict[str, Any] = {self.state: x.to(self.state_dtype)}
        if self.time is not None:
            flat[self.time] = t if self.time_dtype is None else t.to(self.time_dtype)
        flat |= {name: _on(value, x.device) for name, value in self.constants.items()}
        flat |= {name: conditions[name].to(dtype) for name, dtype in self.conditions.items()}
        return _nested(flat, self.nested)


def bound_arguments(forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of `forward` by their names."""
    signature = inspect.signature(forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested arguments as one level, names joined by dots; empty containers stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        inner = _items(value)
        flat |= flattened(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _items(value: Any) -> Mapping[str, Any]:
    """Return what a container holds by name; {} of anything else."""
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, dict, list, tuple)) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return {}


def _containers(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, type]:
    """Return the type of each container among nested arguments, by name; outer ones come first."""
    found: dict[str, type] = {}
    for name, value in arguments.items():
        if inner := _items(value):
            found[f"{prefix}{name}"] = dict if isinstance(value, dict) else type(value)
            found |= _containers(inner, f"{prefix}{name}.")
    return found


def _nested(flat: Mapping[str, Any], containers: Mapping[str, type]) -> dict[str, Any]:
    """Undo `flattened`."""
    nested = dict(flat)
    for name in reversed(list(containers)):  # inner ones first
        prefix = f"{name}."
        inner = {key.removeprefix(prefix): nested.pop(key) for key in list(nested) if key.startswith(prefix)}
        kind = containers[name]
        nested[name] = inner if kind is dict else kind(inner[key] for key in sorted(inner, key=int))
    return nested


def _named(arguments: Mapping[str, Any], names: tuple[str, ...], what: str, *, or_tensor: bool = False) -> str:
    """Return the argument that has one of the `names`, or is the first floating tensor with rows."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    for name in [*names, *(tensors if or_tensor else ())]:
        if name in arguments:
            return name
    raise ConfigError(
        f"the pipeline's network takes {', '.join(arguments)}: none of {', '.join(names)}, its {what}; name another "
        "component by model.component"
    )


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _same(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        return value.shape == expected.shape and torch.equal(value, expected.to(value.device))
    return type(value) is type(expected) and bool(value == expected)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
