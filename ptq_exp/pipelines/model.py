"""`PipelineModel`: a pipeline of diffusers as a model, driven by its own `__call__`."""

from __future__ import annotations

import copy
import inspect
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
from ptq_exp.pipelines.component import (
    BLOCKS,
    FIRST_LAYERS,
    LAST_LAYERS,
    find_component,
    pipeline_digest,
    top_layers,
)
from ptq_exp.pipelines.layout import CallLayout
from ptq_exp.pipelines.network import PipelineNetwork, component_calling
from ptq_exp.pipelines.probe import Stopped, first_call, times_of
from ptq_exp.pipelines.prompts import Request, opened, requests_of
from ptq_exp.pipelines.stand_in import standing_in

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

    Raises:
        ConfigError: no component, an argument that the pipeline does not take, or a pipeline that calls its network in
            a way that cannot be recorded.
    """

    def __init__(
        self, pipeline: Any, prompts: Sequence[str | Request] | str | None = None, *, steps: int | None = None,
        component: str | None = None, call: Mapping[str, Any] | None = None, guidance_scale: float | None = None,
        eta: float | None = None, name: str = "pipeline",
    ) -> None:
        self.name, self.component, self.structure = name, find_component(pipeline, component), None
        self.requests, self.pipeline = requests_of(prompts), _own_copy(pipeline)
        self.call = opened(call or {}) | self._sampler_settings(guidance_scale, eta)
        self._check_arguments()
        self.steps = STEPS if steps is None else steps
        network = getattr(self.pipeline, self.component)
        one, answer = first_call(self.pipeline, self.component, self.arguments([0], 0))
        two, _ = first_call(self.pipeline, self.component, self.arguments([0, 1], 0), evaluated=False)
        layout = CallLayout.of(one, two)
        self.denoiser = PipelineNetwork(network, layout).eval()
        self._example = _cpu(layout.call(one))
        self.copies, self._answer_shape = len(one[layout.state]), tuple(answer.shape[1:])
        channels, height, *rest = self._answer_shape
        self.sample_shape = (channels, self.copies * height, *rest)
        self.schedule, self.clip_sample, self.first_stage = NoiseSchedule(torch.ones(1)), False, None
        self.n_classes, self.null_label, self.conditions = None, None, None
        self.first_layers, self.last_layers = (top_layers(network, globs) for globs in (FIRST_LAYERS, LAST_LAYERS))
        self.blocks = BLOCKS
        self.sampler = SamplerDefaults(
            self.steps, "the pipeline's", self.call.get("eta", self._default("eta", 0.0)), self._guidance_scale
        )

    @cached_property
    def digest(self) -> str:
        """Hash of the pipeline's weights and settings."""
        return pipeline_digest(self.pipeline)

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides the images beside weights, steps and seed."""
        return {"pipeline": type(self.pipeline).__name__, "component": self.component, "call": _text(self.call),
                "requests": _text(self.requests)}

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

    @property
    def unconditional(self) -> dict[str, int | Tensor]:
        """{}: the pipeline evaluates both halves of guidance, and both are recorded."""
        return {}

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
        n = self._classes
        return None if n is None else balanced(n, indices, seed, stream)

    def request(self, index: int, seed: int = 0, stream: int = EVALUATION) -> Request:
        """Return what image `index` is asked for."""
        if self.requests:
            return self.requests[index % len(self.requests)]
        labels = self.labels([index], seed, stream)
        return {} if labels is None else {"class_labels": int(labels[0])}

    def prompts(self, n: int) -> list[str] | None:
        """Return the prompts of images 0..n-1; None where there are none."""
        found = [self.request(i).get("prompt") for i in range(n)]
        return found if all(isinstance(prompt, str) for prompt in found) else None

    def generators(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> list[torch.Generator]:
        """Return the generator of each image, new."""
        return [sample_generator(seed, int(i), stream) for i in indices]

    def arguments(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that draws images `indices` of `seed`."""
        requests = [self.request(int(i), seed, stream) for i in indices]
        given: dict[str, Any] = {name: [request[name] for request in requests] for name in requests[0]}
        parameters = self._parameters
        for name, value in self.call.items():
            per_image = name.startswith("negative_prompt") or name.endswith("image")
            given[name] = [value] * len(requests) if per_image and not isinstance(value, (list, Tensor)) else value
        given["generator"] = self.generators(indices, seed, stream)
        if "prompt" not in given and "batch_size" in parameters:
            given["batch_size"] = len(requests)
        given |= {"num_inference_steps": self.steps} if "num_inference_steps" in parameters else {}
        return given | ({"output_type": "np"} if "output_type" in parameters else {})

    def run(
        self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, *, stream: int = EVALUATION,
        device: torch.device | str = "cpu", steps: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None, **noise_in_eps: Any,
    ) -> Tensor:
        """Draw images [N, C, H, W] in [-1, 1] of sample `indices` of `seed`, with `denoiser` in the component's place.

        Args:
            steps: end after so many of the grid's steps; the images are empty then, [0].
            on_step: sees the first call at each time, with all its rows; see `by_image`.
            noise_in_eps: of the variance correction, which needs our own sampler.

        Raises:
            ConfigError: noise of the estimates is given.
        """
        if noise_in_eps.get("eps_noise_std") is not None:
            raise ConfigError("correction.variance=true: a pipeline's scheduler makes no room for noise; set false")
        if denoiser is self.denoiser and on_step is None and steps is None:
            return self._images(getattr(self.pipeline, self.component), indices, seed, stream, device)
        walk = _Walk(denoiser, grid, len(indices), len(grid) if steps is None else steps, on_step)
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
        pipeline = self.pipeline
        if torch.device(device) != pipeline.device:
            pipeline.to(device)
        with standing_in(pipeline, self.component, component), torch.no_grad():
            images = np.asarray(pipeline(**self.arguments(indices, seed, stream)).images)
        levels = np.rint(np.clip(images, 0, 1) * np.float32(255)).astype(np.float64)  # as diffusers rounds them
        return torch.from_numpy(levels / 127.5 - 1).permute(0, 3, 1, 2).to(device)

    def sample(self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, **kwargs) -> Tensor:
        """Images float64 [N, C, H, W] in [-1, 1] of sample `indices` of `seed`, at the levels of uint8; see `run`."""
        return self.run(denoiser, grid, indices, seed, **kwargs)

    def pipeline_with(self, component: nn.Module) -> Any:
        """Return a pipeline that is used as the model's own, with another `component`, see `answering`."""
        pipeline = _own_copy(self.pipeline)
        setattr(pipeline, self.component, component)
        return pipeline

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.pipeline).__call__).parameters

    @property
    def _guidance_scale(self) -> float:
        value = self.call.get("guidance_scale", self._default("guidance_scale", 1.0))
        return float(value) if isinstance(value, (int, float)) else 1.0

    @property
    def _classes(self) -> int | None:
        """Number of classes of a pipeline that takes labels."""
        if "class_labels" not in self._parameters:
            return None
        return getattr(getattr(self.pipeline, self.component).config, "num_embeds_ada_norm", None)

    def _sampler_settings(self, guidance_scale: float | None, eta: float | None) -> dict[str, float]:
        """Return the arguments for settings of the sampler; ConfigError for one that the pipeline does not take."""
        given = {"guidance_scale": guidance_scale, "eta": eta or None}
        found = {name: value for name, value in given.items() if value is not None}
        for name, value in found.items():
            if name not in self._parameters:
                raise ConfigError(
                    f"sampler.{name}={value}: {type(self.pipeline).__name__} takes no {name}; leave it out"
                )
        return found

    def _default(self, name: str, otherwise: Any) -> Any:
        parameter = self._parameters.get(name)
        found = inspect.Parameter.empty if parameter is None else parameter.default
        return otherwise if found is inspect.Parameter.empty or found is None else found

    def _check_arguments(self) -> None:
        """Raise ConfigError for an argument that the pipeline does not take, or a prompt that is missing."""
        taken, kind = self._parameters, type(self.pipeline).__name__
        for where, names in (("model.call", self.call), ("model.prompts", self.requests[0] if self.requests else ())):
            for name in names:
                if name not in taken:
                    raise ConfigError(f"{where}: {kind} takes no {name}, but {', '.join(list(taken)[1:])}")
        fixed = {"generator", "output_type", "num_inference_steps", "return_dict"} & set(self.call)
        if fixed:
            raise ConfigError(f"model.call.{min(fixed)} is set by the model itself: leave it out")
        if "prompt" in taken and not self.requests and "prompt_embeds" not in self.call:
            raise ConfigError(f"model.prompts=null: {kind} draws from prompts; give a file of them, or a list")


class _Walk:
    """Answers the calls of a component, and shows `on_step` the first one at each time of the grid."""

    def __init__(
        self, denoiser: nn.Module, grid: TimeGrid, images: int, steps: int,
        on_step: Callable[[StepRecord], None] | None,
    ) -> None:
        self.denoiser, self.grid, self.images, self.steps, self.on_step = denoiser, grid, images, steps, on_step
        self.seen: set[int] = set()

    def __call__(self, call: Call) -> Tensor:
        estimate = call.evaluate(self.denoiser)
        if self.on_step is None and self.steps >= len(self.grid):
            return estimate
        step = int(self.grid.step_of(call.t[:1]))
        if step not in self.seen:
            self.seen.add(step)
            if self.on_step is not None:
                self.on_step(StepRecord(step, call, estimate))
        if len(self.seen) >= self.steps < len(self.grid):
            raise Stopped
        return estimate


def _own_copy(pipeline: Any) -> Any:
    """Return a pipeline with the networks of `pipeline` and a scheduler and progress bar of its own."""
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(pipeline.scheduler)
    own.set_progress_bar_config(disable=True)
    return own


def _cpu(call: Call) -> Call:
    return call.mapped(lambda tensor: tensor.detach().cpu())


def _text(value: Any) -> Any:
    """Return plain values of requests, pictures by their content."""
    if isinstance(value, Mapping):
        return {key: _text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(np.asarray(value)).tobytes()).hexdigest()
