"""A quantized model measured as it is executed: times beside other ways, and how near it is to the simulation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.deploy.draw import draw
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.errors import ConfigError
from ptq_exp.evaluation.images import mean_psnr
from ptq_exp.quantization import select_row, step_of
from ptq_exp.runtime import RUNTIMES, Runtime
from ptq_exp.runtime.timing import Times, interleaved, ratio

TORCH, SIMULATION = "torch_fp32", "simulation"
STATES = 5
"""States of a trajectory that noise estimates are compared on."""


def engines(name: str) -> list[str]:
    """Return the runtimes that "all" or the name of one stands for: those that execute integers.

    Raises:
        ConfigError: there is no such runtime.
    """
    found = [runtime for runtime in RUNTIMES if runtime != "simulate"]
    if name == "all":
        return found
    if name not in found:
        raise ConfigError(f"runtime={name}: choose one of all, {', '.join(found)}")
    return [name]


def networks(quantized: QuantizedModel, mixed: bool = False) -> dict[str, nn.Module]:
    """Make every way to compute the network of a model that an engine executes, by name.

    `torch_fp32` is the full-precision network, `simulation` the quantized one, `<engine>_int8` what executes it,
    `<engine>_f32` and `_bf16` the full-precision network on the same engine, where it has those.

    Args:
        mixed: also `<engine>_int8_bf16`, with bf16 for what is not executed as integers.
    """
    runtime, found = quantized.runtime, {}
    full = quantized.model.denoiser if quantized.full_precision else None
    if full is not None:
        found[TORCH] = full
    found[SIMULATION] = quantized.network
    if full is not None and hasattr(runtime, "in_float"):
        found |= {f"{runtime.name}_{precision}": runtime.in_float(full, precision) for precision in ("f32", "bf16")}
    found[f"{runtime.name}_int8"] = quantized.executed_network
    if mixed and hasattr(runtime, "in_float"):
        other = quantized.on(quantized.runtime_name, {**quantized.runtime_options, "precision": "bf16"})
        found[f"{runtime.name}_int8_bf16"] = other.executed_network
    return found


def call_of(quantized: QuantizedModel, images: int) -> Call:
    """Make the call of one evaluation for so many images: twice as many samples where they are guided."""
    samples = images * (2 if quantized.guidance_scale != 1 else 1)
    example = quantized.model.example_inputs().expanded(samples)
    conditions = {name: value.contiguous() for name, value in example.conditions.items()}
    return Call(example.x.contiguous(), example.t.contiguous(), conditions)


@torch.no_grad()
def timed(
    found: Mapping[str, nn.Module], call: Call, repeats: int, budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time one evaluation of each network, in turns; see `interleaved`."""
    for network in found.values():
        if (step := step_of(network)) is not None and not step.is_set:
            select_row(network, 0)
    return interleaved({name: partial(call.evaluate, network) for name, network in found.items()}, repeats,
                       budget=budget, clock=clock)


def times_entry(times: Mapping[str, Times], engine: str, images: int, steps: int) -> dict[str, Any]:
    """Lay out medians for results.json: ms per evaluation and per image, and by how much the engine is faster."""
    mine, medians = f"{engine}_int8", {name: found.median for name, found in times.items()}
    return {
        "ms_per_evaluation": medians,
        "ms_per_image": {name: median * steps / images for name, median in medians.items()},
        "faster_than": {name: ratio(times, name, mine) for name in times if name != mine},
        "repeats": len(times[mine].ms),
    }


def execution_entry(runtime: Runtime) -> dict[str, Any]:
    """Say what executes a model, and what of it as integers, for results.json."""
    rows = runtime.account()
    optional = {"file_bytes": getattr(runtime, "file_bytes", None), "saturation": getattr(runtime, "saturation", None)}
    return {
        "engine": runtime.name, "version": getattr(runtime, "version", torch.__version__),
        "threads": torch.get_num_threads(), "int8_share": rows.int8_share,
        "attention_int8_share": rows.attention_int8_share, **optional,
    }


class _Enough(Exception):
    """The time for a trajectory is over."""


class Trajectory(nn.Module):
    """A denoiser that keeps, for `faithfulness`, calls and answers at a few evaluations of its first trajectory.

    Args:
        steps: evaluations of one trajectory.
        seconds: of the first trajectory, after which nothing more is kept.
        stops: raise after these seconds, in place of going on.
    """

    def __init__(
        self, denoiser: nn.Module, steps: int, seconds: float, clock: Callable[[], float] = time.perf_counter, *,
        stops: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser, self.steps, self.seconds, self.clock, self.stops = denoiser, steps, seconds, clock, stops
        self.forget()

    def forget(self) -> None:
        """Forget the trajectory: the next one is the first."""
        self.n, self.late, self.kept = 0, False, []

    @property
    def whole(self) -> bool:
        """Whether a trajectory has come to its end in time."""
        return self.n == self.steps and not self.late

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        if self.n == self.steps:
            return self.denoiser(x, t, **conditions)
        now = self.clock()
        self.until = self.until if self.n else now + self.seconds
        self.late = self.late or now > self.until
        if self.late and self.stops:
            raise _Enough
        eps = self.denoiser(x, t, **conditions)
        if not self.late and self.n in {round(i * (self.steps - 1) / (STATES - 1)) for i in range(STATES)}:
            self.kept.append((Call(x.clone(), t, conditions), eps.clone()))
        self.n += 1
        return eps


@torch.no_grad()
def faithfulness(
    quantized: QuantizedModel, images: int, seed: int, seconds: float, clock: Callable[[], float] = time.perf_counter,
    simulated: tuple[Trajectory, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Compare what an engine computes with the simulation: noise estimates on its states, then images of one seed.

    Args:
        images: of one batch.
        seconds: that the simulation may draw; it always gives at least one state. Where they are over before the
            images are drawn, there is no PSNR.
        simulated: a trajectory that the simulation drew of these images and this seed, and the images, uint8; None, or
            one that is not whole: it is drawn here.

    Returns:
        {"eps_error": mean relative error over "states" states, "psnr": mean over "images" images, in dB}.
    """
    device = next(quantized.network.parameters()).device
    how = {"batch_size": images, "device": device, "progress": False, **quantized.noise_in_eps}
    if simulated is not None and simulated[0].whole and len(simulated[1]) >= images:
        recorder, wanted = simulated[0], simulated[1][:images]
    else:
        simulation = quantized.on("simulate").denoiser
        recorder = Trajectory(simulation, len(quantized.grid), seconds, clock, stops=True)
        try:
            wanted = draw(quantized.model, recorder, quantized.grid, images, seed, **how)
        except _Enough:
            wanted = None
    errors = [float((call.evaluate(quantized.denoiser) - eps).norm() / eps.norm()) for call, eps in recorder.kept]
    found: dict[str, Any] = {"eps_error": sum(errors) / len(errors), "states": len(errors)}
    if wanted is not None:
        drawn = draw(quantized.model, quantized.denoiser, quantized.grid, images, seed, **how)
        found |= {"psnr": mean_psnr(wanted, drawn), "images": images}
    return found
