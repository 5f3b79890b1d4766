"""`CallLayout`: how a component of a pipeline is called, and the same call as state, time and conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptq_exp.diffusion.call import Call
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines.nested import containers_of, flattened, nested

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
        known: names of all arguments.
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
            ConfigError: there is no state or no time among the arguments, the state has no row per image, or its rows
                have more than one time each.
        """
        (x, t), (more_x, _) = state_and_time(one), state_and_time(two)
        rows, more = len(x), len(more_x)
        if more != 2 * rows:
            raise ConfigError(
                f"the pipeline calls its network with {rows} rows for one image and {more} for two: only pipelines "
                "that evaluate all images of a call together can be quantized"
            )
        if isinstance(t, Tensor) and t.numel() not in (1, rows):
            raise ConfigError(
                f"the pipeline calls its network with times of shape {list(t.shape)} for {rows} rows: only networks "
                "that take one time for each row can be quantized"
            )
        other = flattened(two)

        def has_rows(name: str, value: Any) -> bool:
            return _has_rows(value, rows) and _has_rows(other.get(name), more)

        return cls._of(one, _name(one, STATES), _name(one, TIMES), has_rows)

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any]) -> CallLayout:
        """Find the layout of one call: every tensor as long as the state has its rows.

        Raises:
            ConfigError: there is no state among the arguments.
        """
        tensors = (name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point())
        state = _name(arguments, STATES) or next(tensors, None)
        if state is None:
            raise ConfigError(f"the network takes {', '.join(arguments)}: no tensor of numbers that could be its state")
        rows = len(arguments[state])
        return cls._of(arguments, state, _name(arguments, TIMES), lambda _, value: _has_rows(value, rows))

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
            state, time, at.dtype if isinstance(at, Tensor) else None, conditions, constants, containers_of(arguments),
            arguments[state].dtype, frozenset(flat),
        )

    def call(self, arguments: Mapping[str, Any]) -> Call:
        """Return the call that `arguments` of the component make.

        Raises:
            ConfigError: an argument that never was there before or is there no more, or one that is no tensor of rows
                and has changed.
        """
        flat = flattened(arguments)
        changed = [name for name, value in self.constants.items() if name in flat and not _same(flat[name], value)]
        for name in sorted({*self.known.symmetric_difference(flat), *changed} - {"return_dict"}):
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
        flat |= {name: value.to(x.device) if isinstance(value, Tensor) else value
                 for name, value in self.constants.items()}
        flat |= {name: conditions[name].to(dtype) for name, dtype in self.conditions.items()}
        return nested(flat, self.nested)


def state_and_time(arguments: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return the state and the time among the arguments of a component.

    Raises:
        ConfigError: they are not there, or the state is no tensor with rows.
    """
    state, time = _name(arguments, STATES), _name(arguments, TIMES)
    for name, what in ((state, "state"), (time, "time")):
        if name is None:
            raise ConfigError(
                f"the pipeline's network takes {', '.join(arguments)}: none of "
                f"{', '.join(STATES if what == 'state' else TIMES)}, its {what}; name another component by "
                "model.component"
            )
    x = arguments[state]
    if not isinstance(x, Tensor) or x.ndim < 3:
        raise ConfigError(f"the pipeline's network takes no tensor [B, C, ...] as its {state}: it cannot be quantized")
    return x, arguments[time]


def _name(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in arguments), None)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _same(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        return value.shape == expected.shape and torch.equal(value, expected.to(value.device))
    try:
        return type(value) is type(expected) and bool(value == expected)
    except (RuntimeError, ValueError):  # arrays, of which no single answer can be given
        return False
