"""What a pipeline does with its network, found by calling it: the arguments of its first calls, and all times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call
from ptq_exp.errors import ConfigError, PTQError, one_line
from ptq_exp.pipelines.component import standing_in
from ptq_exp.pipelines.layout import CallLayout, state_and_time
from ptq_exp.pipelines.nested import bound_arguments, containers_of, flattened, nested
from ptq_exp.pipelines.network import channels_first, component_calling
from ptq_exp.pipelines.randomness import own_random_numbers

_AUTOENCODERS = ("vae", "vqvae", "movq")


class Stopped(Exception):
    """Leaves a pipeline's call."""


def first_calls(
    pipeline: Any, component: str, arguments: Mapping[str, Any], *, evaluated: bool = True
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the arguments by name of the component's first evaluation, and its estimates [B, C, ...].

    An evaluation is one call, or several in a row with the same states and time: true guidance of FLUX shows each
    condition in a call of its own.

    Args:
        arguments: of the pipeline's call.
        evaluated: False = the component is not evaluated, only one call is looked at, and the estimates are empty.

    Raises:
        ConfigError: the pipeline does not call it, or cannot be called with these arguments.
    """
    network = getattr(pipeline, component)
    found: list[dict[str, Any]] = []
    estimates = [torch.zeros(0)]

    def look(*args: Any, **kwargs: Any) -> Any:
        given = bound_arguments(type(network).forward.__get__(network), args, kwargs)
        if found and not _of_one_evaluation(found[0], given):
            raise Stopped
        found.append(nested(flattened(given), containers_of(given)))  # the pipeline may change its own dicts
        if not evaluated:
            raise Stopped
        answer = network(*args, **kwargs)
        estimates[:] = [channels_first(answer[0])]
        return answer

    _call(pipeline, component, look, arguments)
    if not found:
        raise ConfigError(f"{type(pipeline).__name__} never calls its {component}: name another by model.component")
    return found, estimates[0]


def times_of(
    pipeline: Any, component: str, arguments: Mapping[str, Any], layout: CallLayout, shape: tuple[int, ...]
) -> Tensor:
    """Return the times that the component is called with in one run, each once, float64 [S].

    The component is not evaluated: it answers zeros of `shape` [C, ...]. Times are the scheduler's and depend on no
    estimate.
    """
    times: list[float] = []

    def answer(call: Call) -> Tensor:
        times.append(float(call.t[0]))
        return call.x.new_zeros(len(call.x), *shape)

    shell = component_calling(getattr(pipeline, component), layout.call, answer)
    _call(pipeline, component, shell.forward, arguments)
    return torch.tensor(list(dict.fromkeys(times)), dtype=torch.float64)


def _of_one_evaluation(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two calls have the same states and time, and can be joined: all else of the same shapes."""
    (x, t), (other_x, other_t) = state_and_time(one), state_and_time(other)
    flat, other_flat = ({name: _shape(value) for name, value in flattened(call).items()} for call in (one, other))
    same_time = torch.equal(torch.as_tensor(t), torch.as_tensor(other_t))
    return flat == other_flat and same_time and torch.equal(x, other_x)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


class _Undecoded(nn.Module):
    """An autoencoder that ends the call where the pipeline would decode: there is nothing to see."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["autoencoder"] = autoencoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["autoencoder"], name)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """End the call."""
        raise Stopped


def _call(pipeline: Any, component: str, forward: Callable, arguments: Mapping[str, Any]) -> None:
    """Run the pipeline up to the end of sampling, its component called by `forward`.

    Raises:
        ConfigError: what the pipeline itself finds wrong with its arguments.
    """
    shell = copy.copy(getattr(pipeline, component))
    shell.forward = forward
    with ExitStack() as stack, torch.no_grad(), own_random_numbers(0, pipeline.device):
        stack.enter_context(standing_in(pipeline, component, shell))
        for name in _AUTOENCODERS:
            if isinstance(getattr(pipeline, name, None), nn.Module):
                stack.enter_context(standing_in(pipeline, name, _Undecoded(getattr(pipeline, name))))
        try:
            pipeline(**arguments)
        except Stopped:
            pass
        except (PTQError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # pipelines check little: a wrong size may end in any kind of error
            raise ConfigError(
                f"{type(pipeline).__name__} cannot draw with the given model.call and model.prompts: {one_line(error)}"
            ) from error
