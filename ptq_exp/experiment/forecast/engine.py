"""How long the engine takes that draws the images, or is compared with what does."""

from __future__ import annotations

from dataclasses import dataclass

from ptq_exp.deploy.measure import STATES
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.execution import options_of
from ptq_exp.experiment.forecast.probe import Line, measured
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import select_row, step_of
from ptq_exp.settings.schema import RuntimeConfig


@dataclass(frozen=True)
class Engine:
    """An engine and the network that it executes.

    Attributes:
        compiled: seconds until it could be evaluated.
        speed: of an evaluation, guided.
        floats: further networks that it is measured with, the full-precision one in its number types.
    """

    compiled: float
    speed: Line
    floats: int


def engine_of(run: Run, quantized: QuantizedModel, settings: RuntimeConfig, line) -> Engine:
    """Compile a quantized network for the engine of the settings, and measure it.

    Args:
        line: measures the speed of a network.

    Raises:
        PTQError: the engine cannot execute it.
    """
    engine = quantized.on(settings.engine, options_of(settings.engine, settings.engine_options, run))
    compiled, _ = measured(lambda: engine.executed_network, run.device)
    network = engine.executed_network
    if step_of(network) is not None:
        select_row(network, 0)
    floats = 2 if hasattr(engine.runtime, "in_float") and engine.full_precision else 0
    return Engine(compiled, line(run.model.guided(network, run.guidance_scale)), floats)


def measuring_seconds(
    engine: Engine, full: Line, simulated: Line, settings: RuntimeConfig, images: int, steps: int
) -> float:
    """Return the seconds of comparing an engine with the simulation and of timing it, for one batch of images.

    The simulation draws as long as it may; the engine answers its states, and draws the same images where the
    simulation came to the end. Then all networks are evaluated in turns; none begins after the time is over.
    """
    most = settings.measure_seconds
    draws = steps * simulated.seconds(images)
    one = engine.speed.seconds(images)
    seconds = engine.compiled * (1 + engine.floats)
    if draws <= most:
        seconds += draws + (min(STATES, steps) + steps) * one
    else:
        done = most / simulated.seconds(images) / steps
        seconds += most + simulated.seconds(images) + max(1, int(STATES * done)) * one
    turn = full.seconds(images) * (1 + engine.floats) + simulated.seconds(images) + one
    turns = min(settings.measure, int(most / turn) + 1)
    return seconds + (1 + turns) * turn  # the first is not counted by what is measured
