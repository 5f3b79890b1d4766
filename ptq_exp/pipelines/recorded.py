"""`RecordedModel`: a network of which nothing is known but calls that somebody has recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.diffusion import Call, DiffusionModel, NoiseSchedule, SamplerDefaults, TimeGrid
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.pipelines.component import BLOCKS, FIRST_LAYERS, LAST_LAYERS, top_layers
from ptq_exp.pipelines.identity import add_weights, plain
from ptq_exp.pipelines.layout import CallLayout
from ptq_exp.pipelines.nested import bound_arguments
from ptq_exp.pipelines.network import PipelineNetwork, channels_first

Recorded = Mapping[str, Any] | Sequence[Any]
"""Arguments of one call: by name; or in order, with a mapping of those by name at the end where there are any."""


class RecordedModel(DiffusionModel):
    """Any network, calibrated on recorded calls; it has no sampler, so that nothing can be drawn with it.

    Args:
        network: any module whose first output is a tensor; a row of it belongs to a row of its state, the argument
            named `sample` or `hidden_states`, otherwise the first tensor.
        calls: at least one; of one layout, with any number of rows.
        name: what messages call it.

    Raises:
        DataError: no calls, or calls of different arguments.
    """

    def __init__(self, network: nn.Module, calls: Sequence[Recorded], name: str = "network") -> None:
        if not calls:
            raise DataError("calls: there are none; give at least one call of the network, its arguments by name")
        bound = [_bound(network, call) for call in calls]
        layout = CallLayout.of_call(bound[0])
        self.name, self.denoiser = name, PipelineNetwork(network, layout).eval()
        try:
            self.calls = [layout.call(arguments) for arguments in bound]
        except (ConfigError, KeyError) as error:
            raise DataError(f"calls: they are not all of one layout: {error}") from error
        with torch.no_grad():
            answer = network(**layout.arguments(*self.calls[0]))
        shape = channels_first(answer if isinstance(answer, Tensor) else answer[0]).shape
        self.sample_shape = self.image_shape = tuple(shape[1:])
        self.schedule, self.clip_sample = NoiseSchedule(torch.ones(1)), False
        self.first_layers, self.last_layers = (top_layers(network, globs) for globs in (FIRST_LAYERS, LAST_LAYERS))
        self.blocks, self.sampler = BLOCKS, SamplerDefaults(len(self._times), "recorded")

    @cached_property
    def digest(self) -> str:
        """Hash of the weights."""
        found = hashlib.sha256(type(self.denoiser.component).__name__.encode())
        add_weights(found, self.denoiser.component)
        return found.hexdigest()

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides the calibration set: the calls."""
        return {"calls": plain([list(call) for call in self.calls])}

    @cached_property
    def _times(self) -> Tensor:
        times = torch.cat([call.t.cpu().double() for call in self.calls])
        return times.unique().flip(0)

    def time_grid(
        self, steps: int | None = None, spacing: str | None = None, *, eta: float | None = None, solver: str = "ddim"
    ) -> TimeGrid:
        """Return the times of the recorded calls, the largest first."""
        ones = torch.ones(len(self._times), dtype=torch.float64)
        return TimeGrid(self._times, ones, ones, 0.0, "recorded")

    def in_parts(self, network: nn.Module) -> nn.Module:
        """`network`: its rows are those of whole calls."""
        return network

    def guided(self, denoiser: nn.Module, guidance_scale: float = 1.0) -> nn.Module:
        """`denoiser`: whoever calls the network guides, at any scale."""
        del guidance_scale
        return denoiser

    def example_inputs(self) -> Call:
        """Return the first row of the first call."""
        device = next(self.denoiser.parameters()).device
        return self.calls[0].mapped(lambda tensor: tensor[:1]).to(device)

    def check_calls(self, grid: TimeGrid, seed: int, device: torch.device | str = "cpu") -> list[Call]:
        """Return the first call."""
        return [self.calls[0].to(device)]

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing can be drawn.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.name} is a network alone: it has no sampler to draw with; call quantized.component")


def _bound(network: nn.Module, call: Recorded) -> dict[str, Any]:
    if isinstance(call, Mapping):
        args, kwargs = (), call
    else:
        args, kwargs = tuple(call), {}
        if args and isinstance(args[-1], Mapping):
            args, kwargs = args[:-1], args[-1]
    try:
        return bound_arguments(network.forward, args, kwargs)
    except TypeError as error:
        raise DataError(f"calls: the network cannot be called with these arguments: {error}") from error
