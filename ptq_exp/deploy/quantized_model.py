"""`QuantizedModel`: a quantized network with all that it is sampled with; one object, saved as one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.correction import BitSchedule, Corrected, NoiseStatistics, Scheduled, VarianceFit
from ptq_exp.deploy.draw import draw
from ptq_exp.deploy.saving import save_component, save_model, save_pipeline
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines import PipelineModel, PipelineNetwork, answering
from ptq_exp.quantization import Applied, Report, Rule
from ptq_exp.runtime import GraphedNetwork, Runtime, runtime_of


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized network, its policy and ranges, its bit schedule, its correction, and how it is sampled.

    Attributes:
        model: the diffusion model; its `denoiser` is the full-precision one where `full_precision`, else `network`.
        network: the quantized network alone. Where activations have several rows of ranges, choose with `select_row`.
        report: coverage, bits and bit operations of every layer, over all steps.
        grid: the sampling steps that it was made for.
        guidance_scale: of classifier-free guidance, 1 = none.
        rules: that placed the quantizers of the network.
        widths: bits of the activations, ascending, one for each row of ranges; () = those of the rules.
        time_bins: row of the activation ranges in each step, int64 [S]; None = the same ranges in all steps.
        schedule: bits of the activations in each step; None = one width.
        statistics: of the quantization noise in each step, for the correction; None = no correction.
        variance: whether the sampler's own noise makes room for that of the quantization.
        convention: "paper" or "code", of the variance correction.
        transforms: that the full-precision network went through before it was quantized, in order.
        runtime_name: of what executes the network, see `ptq_exp.runtime`; `runtime` is the object.
        runtime_options: of its constructor, such as {"precision": "bf16"} of openvino.
        full_precision: whether the full-precision weights are there, too.
        compile: whether networks are compiled.
        cuda_graph: whether evaluations of a sampling step are recorded and replayed, see `GraphedNetwork`.
        recipe: what it was made from and with, as plain values for quantization.json.
    """

    model: DiffusionModel
    network: nn.Module
    report: Report
    grid: TimeGrid
    guidance_scale: float = 1.0
    rules: tuple[Rule, ...] = ()
    widths: tuple[int, ...] = ()
    time_bins: Tensor | None = None
    schedule: BitSchedule | None = None
    statistics: NoiseStatistics | None = None
    variance: bool = False
    convention: str = "paper"
    transforms: tuple[Applied, ...] = ()
    runtime_name: str = "simulate"
    runtime_options: Mapping[str, Any] = field(default_factory=dict)
    full_precision: bool = True
    compile: bool = False
    cuda_graph: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser that images are drawn with: guided, at the bits and ranges of each step, corrected."""
        return self.uncorrected if self.statistics is None else Corrected(self.uncorrected, self.statistics, self.grid)

    @cached_property
    def uncorrected(self) -> nn.Module:
        """The same without the correction of the noise."""
        return self._guided(self.rows)

    @property
    def rows(self) -> Tensor | None:
        """Row of the activation ranges in each step, int64 [S]; None where there is one row."""
        if self.time_bins is not None:
            return self.time_bins
        return None if self.schedule is None or len(self.widths) < 2 else self.schedule.rows(list(self.widths))

    def at_row(self, row: int) -> nn.Module:
        """Return the guided denoiser with one row of the activation ranges in all steps."""
        return self._guided(torch.full((len(self.grid),), row) if len(self.widths) > 1 else None)

    @cached_property
    def _execution(self) -> tuple[Runtime, nn.Module]:
        """The runtime, and the network that it made."""
        runtime = runtime_of(self.runtime_name, self.runtime_options)
        device = next(self.network.parameters()).device
        return runtime, runtime.compile(self.network, self.model.example_inputs().to(device))

    @property
    def runtime(self) -> Runtime:
        """What executes the network; its `account()` says how each operation is executed, and `int8_share`."""
        return self._execution[0]

    @property
    def executed_network(self) -> nn.Module:
        """The network as the runtime executes it, called as `network` is."""
        return self._execution[1]

    def on(self, runtime_name: str, runtime_options: Mapping[str, Any] | None = None) -> QuantizedModel:
        """Make the same model, executed by another runtime."""
        recorded = self.cuda_graph and runtime_name != "openvino"  # which computes on the CPU
        return replace(self, runtime_name=runtime_name, runtime_options=runtime_options or {}, cuda_graph=recorded)

    @cached_property
    def component(self) -> nn.Module:
        """The quantized network as it was called before it was one of state, time and conditions.

        Raises:
            ConfigError: the model never was a pipeline, or a network with recorded calls.
        """
        if not isinstance(self.network, PipelineNetwork):
            raise ConfigError(f"{self.model.name} is no pipeline: its quantized network is quantized.network")
        fixed = self.runtime_name != "simulate"
        component = answering(self.network, self.denoiser, fixed=fixed)
        component.save_pretrained = partial(save_component, self)
        if fixed:  # an engine's network is another one, which adapters would not reach
            component.load_lora_adapter = component.add_adapter = partial(_refuse_adapters, self.runtime_name)
        return component

    @cached_property
    def pipeline(self) -> Any:
        """A pipeline that is used as the original one, its network quantized.

        Raises:
            ConfigError: the model never was a pipeline.
        """
        if not isinstance(self.model, PipelineModel):
            raise ConfigError(f"{self.model.name} is no pipeline of diffusers: draw by quantized.sample(n, seed)")
        return self.model.pipeline_with(self.component)

    def _guided(self, rows: Tensor | None) -> nn.Module:
        network = self.executed_network
        if self.cuda_graph:
            network = GraphedNetwork(network)
        elif getattr(self.runtime, "shared", False):
            network = self.model.in_parts(network)
        denoiser = network if rows is None else Scheduled(network, rows, self.grid)
        if self.compile:
            denoiser.compile()
        return self.model.guided(denoiser, self.guidance_scale)

    @property
    def eps_noise_std(self) -> Tensor | None:
        """Standard deviation of the noise left in the estimates, [S]; None where the sampler makes no room for it."""
        if self.statistics is None or not self.variance or self.grid.eta == 0:
            return None
        return self.statistics.eps_noise_std

    @property
    def noise_in_eps(self) -> dict[str, Any]:
        """What the sampler has to know of noise in the estimates: arguments of `ptq_exp.diffusion.sample`."""
        return {"eps_noise_std": self.eps_noise_std, "convention": "code" if self.convention == "code" else "exact"}

    @property
    def variance_fit(self) -> VarianceFit | None:
        """How far the sampler's own noise makes room; None without variance correction."""
        if self.statistics is None or not self.variance:
            return None
        return VarianceFit.of(self.grid, self.statistics.eps_noise_std)

    def sample(
        self, n: int, seed: int = 0, *, batch_size: int = 8, device: torch.device | str = "cpu", progress: bool = False
    ) -> np.ndarray:
        """Draw images 0..n-1 of `seed`, uint8 [n, H, W, C]; image i depends on (seed, i) alone.

        Args:
            batch_size: images per network evaluation (twice as many with guidance).
            device: where to compute; the model is moved there.
            progress: show a progress bar.

        Raises:
            DataError: the images hold NaN or infinity.
        """
        return draw(
            self.model, self.denoiser, self.grid, n, seed, batch_size=batch_size, device=device, progress=progress,
            **self.noise_in_eps,
        )

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the folder that `ptq_exp.load_quantized` reads; returns the content of its quantization.json.

        Of a pipeline it is a whole folder of diffusers, which `DiffusionPipeline.from_pretrained` reads, too, after
        `import ptq_exp`: other components as they are, and a packed one.

        Raises:
            ConfigError: nobody knows what the model was made from, so that it could not be built again.
            PTQError: a file cannot be written.
        """
        if isinstance(self.model, PipelineModel):
            return save_pipeline(self, Path(folder))
        return save_model(self, Path(folder))


def _refuse_adapters(runtime: str, *_: Any, **__: Any) -> None:
    raise ConfigError(f"runtime={runtime} executes a network of its own: load adapters with runtime=simulate")
