"""How long the engine takes that draws the images, or is compared with what does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptq_exp.deploy.measure import STATES
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.experiment.forecast.probe import Line, measured
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import select_row, step_of
from ptq_exp.settings.schema_machine import RuntimeConfig


@dataclass(frozen=True)
class Engine:
    """An engine and the network that it executes.

    Attributes:
        compiled: seconds until it could be evaluated on samples of one size.
        speed: of an evaluation, guided.
        floats: the same for each of the further networks that it is measured with, the full-precision one in its number
            types.
        bytes: most that compiling takes.
    """

    compiled: float
    speed: Line
    floats: tuple[float, ...] = ()
    bytes: float = 0.0


@torch.no_grad()
def engine_of(run: Run, quantized: QuantizedModel, settings: RuntimeConfig, call: Call) -> Engine:
    """Compile a quantized network for the engine of the settings, and measure it on a call of one batch of images.

    Engines compile for the sizes that they see, so that a line through others would measure compilations.

    Raises:
        PTQError: the engine cannot execute it.
    """
    engine = quantized.on(settings.engine, settings.engine_options)  # without the cache: nobody wants it again
    if (step := step_of(quantized.network)) is not None and not step.is_set:
        select_row(quantized.network, 0)

    def evaluate() -> None:
        network = engine.executed_network
        if step_of(network) is not None:
            select_row(network, 0)
        call.evaluate(run.model.guided(network, run.guidance_scale))

    first, taken = measured(evaluate, run.device)
    again, _ = measured(evaluate, run.device, repeats=3)
    floats = ()
    if hasattr(engine.runtime, "in_float") and engine.full_precision:
        seconds, _ = measured(lambda: call.evaluate(engine.runtime.in_float(run.model.denoiser, "f32")), run.device)
        floats = (max(seconds - again, 0.0),) * 2
    return Engine(max(first - again, 0.0), Line(0.0, again / len(call.x)), floats, taken)


def measuring_seconds(
    engine: Engine, full: Line, simulated: Line, settings: RuntimeConfig, images: int, steps: int
) -> float:
    """Return the seconds of comparing an engine with the simulation and of timing it, for one batch of images.

    The simulation draws as long as it may, again where it did not come to the end while it drew the images of the run;
    the engine answers its states, and draws the same images where the simulation came to the end. Then all networks
    are evaluated in turns; none begins after the time is over.
    """
    most = settings.measure_seconds
    draws = steps * simulated.seconds(images)
    one = engine.speed.seconds(images)
    seconds = sum(engine.floats) + (engine.compiled if settings.name == "simulate" else 0.0)  # else it is in the cache
    if draws <= most:
        seconds += (0.0 if settings.name == "simulate" else draws) + (min(STATES, steps) + steps) * one
    else:
        done = most / simulated.seconds(images) / steps
        seconds += most + simulated.seconds(images) + max(1, int(STATES * done)) * one
    turn = full.seconds(images) * (1 + len(engine.floats)) + simulated.seconds(images) + one
    turns = min(settings.measure, int(most / turn) + 1)
    return seconds + (1 + turns) * turn  # the first is not counted by what is measured
