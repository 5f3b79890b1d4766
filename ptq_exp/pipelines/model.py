"""`PipelineModel`: a pipeline of diffusers as a model, driven by its own `__call__`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.diffusion import Call, DiffusionModel, NoiseSchedule, SamplerDefaults, StepRecord, TimeGrid
from ptq_exp.diffusion.conditions import balanced
from ptq_exp.diffusion.noise import EVALUATION, sample_generator
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines.adapters import without_fused
from ptq_exp.pipelines.arguments import call_arguments, check_arguments, checked_classes, number, sampler_arguments
from ptq_exp.pipelines.component import (
    BLOCKS,
    FIRST_LAYERS,
    LAST_LAYERS,
    find_component,
    own_copy,
    standing_in,
    top_layers,
)
from ptq_exp.pipelines.identity import pipeline_digest, plain
from ptq_exp.pipelines.layout import CallLayout
from ptq_exp.pipelines.network import PipelineNetwork, component_calling
from ptq_exp.pipelines.probe import Stopped, first_calls, times_of
from ptq_exp.pipelines.prompts import Request, opened, requests_of
from ptq_exp.pipelines.randomness import own_random_numbers
from ptq_exp.pipelines.walk import Walk, joined

STEPS = 20


class PipelineModel(DiffusionModel):
    """Any pipeline of diffusers, of which one component is quantized.

    Scheduler, text encoder, guidance, autoencoder are the pipeline's own. Image i is drawn with request i (of
    `prompts`, over and over) and a generator of its own. What the component receives is a `Call` with a row for each
    row that the pipeline evaluates; a `TimeGrid` holds the times that it is called with, in their order, and nothing
    else: noise levels are the scheduler's business.

    Args:
        pipeline: stays as it is; its networks are shared.
        prompts: see `requests_of`; None = classes in turn where the pipeline takes them, else no condition.
        steps: `num_inference_steps`; None = 20.
        component: to be quantized; None = see `find_component`.
        call: further arguments of the pipeline's call, the same for all images.
        guidance_scale, eta: arguments of the call, too; None = the pipeline's defaults.
        name: what tables call it.
        asked: class that each request asks for, for the score `prompt_accuracy`; None = nothing names one.

    Raises:
        ConfigError: no component, an argument that the pipeline does not take, or a pipeline that calls its network in
            a way that cannot be recorded.
    """

    def __init__(
        self, pipeline: Any, prompts: Sequence[str | Request] | str | None = None, *, steps: int | None = None,
        component: str | None = None, call: Mapping[str, Any] | None = None, guidance_scale: float | None = None,
        eta: float | None = None, name: str = "pipeline", asked: Sequence[int] | None = None,
    ) -> None:
        self.name, self.component = name, find_component(pipeline, component)
        self.requests, self.pipeline = requests_of(prompts), own_copy(pipeline)
        self._asked = None if asked is None else list(asked)
        self.call = opened(call or {}) | sampler_arguments(pipeline, guidance_scale=guidance_scale, eta=eta or None)
        self.steps = STEPS if steps is None else steps
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={steps}: choose 1 or more")
        check_arguments(self.pipeline, self.call, self.requests)
        network = without_fused(getattr(self.pipeline, self.component), self.component)
        setattr(self.pipeline, self.component, network)
        self._classes = checked_classes(self.pipeline, self.component, (self.call, *self.requests))
        calls, answer = first_calls(self.pipeline, self.component, self.arguments([0], 0))
        two, _ = first_calls(self.pipeline, self.component, self.arguments([0, 1], 0), evaluated=False)
        layout = CallLayout.of(calls[0], two[0])
        self.denoiser = PipelineNetwork(network, layout).eval()
        self._example = joined([layout.call(call) for call in calls]).mapped(lambda tensor: tensor.detach().cpu())
        self.calls, self.copies, self._answer_shape = len(calls), len(self._example.x), tuple(answer.shape[1:])
        channels, height, *rest = self._answer_shape
        self.sample_shape = (channels, self.copies * height, *rest)
        self.schedule, self.clip_sample = NoiseSchedule(torch.ones(1)), False
        self.first_layers, self.last_layers = (top_layers(network, globs) for globs in (FIRST_LAYERS, LAST_LAYERS))
        self.blocks = BLOCKS
        eta, scale = (number(self.pipeline, self.call, *of) for of in (("eta", 0.0), ("guidance_scale", 1.0)))
        self.sampler = SamplerDefaults(self.steps, "the pipeline's", eta, scale)

    @cached_property
    def digest(self) -> str:
        """Hash of the pipeline's weights and settings."""
        return pipeline_digest(self.pipeline)

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides the images beside weights, steps and seed."""
        return {"pipeline": type(self.pipeline).__name__, "component": self.component, "call": plain(self.call),
                "requests": plain(self.requests)}

    def time_grid(
        self, steps: int | None = None, spacing: str | None = None, *, eta: float | None = None, solver: str = "ddim"
    ) -> TimeGrid:
        """Return the times that the component is called with, each once, in the order of the calls.

        Raises:
            ConfigError: a setting of a sampler that the pipeline's own does not have.
        """
        for setting, value, own in (
            ("steps", steps, self.steps), ("spacing", spacing, self.sampler.spacing), ("eta", eta, self.sampler.eta),
            ("solver", solver, "ddim"),
        ):
            if value is not None and value != own:
                raise ConfigError(
                    f"sampler.{setting}={value}: a pipeline is driven by its own scheduler, with {own}; leave it out"
                )
        times = self._times
        ones = torch.ones(len(times), dtype=torch.float64)
        return TimeGrid(times, ones, ones, 0.0, "pipeline")

    @cached_property
    def _times(self) -> Tensor:
        arguments = self.arguments([0], 0)
        return times_of(self.pipeline, self.component, arguments, self.denoiser.layout, self._answer_shape)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, found by drawing one with a network that answers zeros."""
        def zeros(call: Call) -> Tensor:
            return call.x.new_zeros(len(call.x), *self._answer_shape)

        shell = component_calling(self.denoiser.component, self.denoiser.layout.call, zeros)
        return tuple(self._images(shell, [0], 0, EVALUATION, self.pipeline.device).shape[1:])

    def in_parts(self, network: nn.Module) -> nn.Module:
        """`network`: its rows are those of whole calls."""
        return network

    def guided(self, denoiser: nn.Module, guidance_scale: float = 1.0) -> nn.Module:
        """`denoiser`: guidance is the pipeline's own.

        Raises:
            ConfigError: another scale than the pipeline's.
        """
        if guidance_scale not in (1.0, self.sampler.guidance_scale):
            raise ConfigError(
                f"sampler.guidance_scale={guidance_scale}: a pipeline guides by itself; set model.call.guidance_scale"
            )
        return denoiser

    def example_inputs(self) -> Call:
        """Return a call of one row, as the pipeline made it."""
        device = next(self.denoiser.parameters()).device
        return self._example.mapped(lambda tensor: tensor[:1]).to(device)

    def check_calls(self, grid: TimeGrid, seed: int, device: torch.device | str = "cpu") -> list[Call]:
        """Return the first call of the network for image 0, as the pipeline makes it."""
        del grid, seed
        return [self._example.to(device)]

    def draw_conditions(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> dict[str, Tensor]:
        """{}: conditions come with the calls."""
        return {}

    def by_image(self, estimates: Tensor, images: int) -> Tensor:
        """Rows of one image, [k N, C, H, ...], behind each other: [N, C, k H, ...]."""
        return torch.cat(estimates.chunk(len(estimates) // images), dim=2)

    def labels(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> Tensor | None:
        """Class of each image, int64 [N], where the pipeline takes classes; None otherwise."""
        if self.requests:
            classes = [self.requests[i % len(self.requests)].get("class_labels") for i in indices]
            return torch.tensor(classes) if all(isinstance(label, int) for label in classes) else None
        return None if self._classes is None else balanced(self._classes, indices, seed, stream)

    def request(self, index: int, seed: int = 0, stream: int = EVALUATION) -> Request:
        """Return what image `index` is asked for."""
        if self.requests:
            return self.requests[index % len(self.requests)]
        labels = self.labels([index], seed, stream)
        return {} if labels is None else {"class_labels": int(labels[0])}

    def asked(self, indices: Sequence[int], seed: int) -> list[int] | None:
        """Class that each image is asked to show; None = nothing names one."""
        return None if self._asked is None else [self._asked[int(i) % len(self._asked)] for i in indices]

    def prompts(self, indices: Sequence[int], seed: int) -> list[str] | None:
        """Text that each image is drawn from; None where there is none."""
        found = [({"prompt": self.call.get("prompt")} | dict(self.request(int(i), seed)))["prompt"] for i in indices]
        return found if all(isinstance(prompt, str) for prompt in found) else None

    def arguments(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that draws images `indices` of `seed`; its generators are new."""
        requests = [self.request(int(i), seed, stream) for i in indices]
        own = {"num_inference_steps": self.steps, "output_type": "np"}
        given = call_arguments(self.pipeline, requests, self.call, own)
        return given | {"generator": [sample_generator(seed, int(i), stream) for i in indices]}

    def run(
        self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, *, stream: int = EVALUATION,
        device: torch.device | str = "cpu", steps: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None, **noise_in_eps: Any,
    ) -> Tensor:
        """Draw images of sample `indices` of `seed`, with `denoiser` in the component's place.

        They are float64 [N, C, H, W] in [-1, 1], at the levels of uint8.

        Args:
            steps: end after so many of the grid's steps; the images are empty then, [0].
            on_step: sees the first evaluation at each time, with all its rows; see `Walk` and `by_image`.
            noise_in_eps: of the variance correction, which needs our own sampler.

        Raises:
            ConfigError: noise of the estimates is given.
        """
        if noise_in_eps.get("eps_noise_std") is not None:
            raise ConfigError("correction.variance=true: a pipeline's scheduler makes no room for noise; set false")
        if denoiser is self.denoiser and on_step is None and steps is None:
            return self._images(getattr(self.pipeline, self.component), indices, seed, stream, device)
        walk = Walk(denoiser, grid, len(grid) if steps is None else steps, on_step, self.calls)
        shell = component_calling(self.denoiser.component, self.denoiser.layout.call, walk)
        stop_early = steps is not None and steps < len(grid)
        try:
            if steps == 0:
                raise Stopped
            return self._images(shell, indices, seed, stream, device)
        except Stopped:
            if not stop_early:
                raise
            return torch.zeros(0)

    def _images(
        self, component: nn.Module, indices: Sequence[int], seed: int, stream: int, device: torch.device | str
    ) -> Tensor:
        pipeline, kind, arguments = self.pipeline, type(self.pipeline).__name__, self.arguments(indices, seed, stream)
        if torch.device(device) != pipeline.device:
            pipeline.to(device)
        further = own_random_numbers(arguments["generator"][0].initial_seed(), pipeline.device, kind)
        with standing_in(pipeline, self.component, component), torch.no_grad(), further:
            drawn = pipeline(**arguments)
        if getattr(drawn, "images", None) is None:
            raise ConfigError(f"{kind} draws no images, but {', '.join(drawn)}: only images can be evaluated")
        images = np.asarray(drawn.images)
        levels = np.rint(np.clip(images, 0, 1) * np.float32(255)).astype(np.float64)  # as diffusers rounds them
        return torch.from_numpy(levels / 127.5 - 1).permute(0, 3, 1, 2).to(device)

    def pipeline_with(self, component: nn.Module) -> Any:
        """Return a pipeline that is used as the model's own, with another `component`, see `answering`."""
        pipeline = own_copy(self.pipeline)
        setattr(pipeline, self.component, component)
        return pipeline
