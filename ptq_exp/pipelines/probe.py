"""What a pipeline does with its network, found by calling it: the arguments of its first call, and all times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines.layout import CallLayout, bound_arguments
from ptq_exp.pipelines.network import channels_first, component_calling
from ptq_exp.pipelines.stand_in import standing_in


class Stopped(Exception):
    """Leaves a pipeline's call."""


def first_call(
    pipeline: Any, component: str, arguments: Mapping[str, Any], *, evaluated: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments by name of the first call of the component, and its estimates [B, C, ...].

    Args:
        arguments: of the pipeline's call.
        evaluated: False = the component is not evaluated, and the estimates are empty.

    Raises:
        ConfigError: the pipeline does not call it.
    """
    network = getattr(pipeline, component)
    found: list[tuple[dict[str, Any], Tensor]] = []

    def look(*args: Any, **kwargs: Any) -> Any:
        given = bound_arguments(type(network).forward.__get__(network), args, kwargs)
        answer = network(**(given | {"return_dict": False}))[0] if evaluated else torch.zeros(0)
        found.append((given, channels_first(answer)))
        raise Stopped

    _call(pipeline, component, look, arguments)
    if not found:
        raise ConfigError(f"{type(pipeline).__name__} never calls its {component}: name another by model.component")
    return found[0]


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
    _call(pipeline, component, shell.forward, arguments, undecoded=True)
    return torch.tensor(list(dict.fromkeys(times)), dtype=torch.float64)


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


def _call(
    pipeline: Any, component: str, forward: Callable, arguments: Mapping[str, Any], *, undecoded: bool = False
) -> None:
    """Run the pipeline, its component called by `forward`."""
    shell = copy.copy(getattr(pipeline, component))
    shell.forward = forward
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(standing_in(pipeline, component, shell))
        if undecoded and isinstance(getattr(pipeline, "vae", None), nn.Module):
            stack.enter_context(standing_in(pipeline, "vae", _Undecoded(pipeline.vae)))
        try:
            pipeline(**arguments)
        except Stopped:
            pass
