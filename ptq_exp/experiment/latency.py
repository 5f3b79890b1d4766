"""How long layers take on an engine: a table of single layers timed at each candidate, and the rest of the network."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.diffusion import Call
from ptq_exp.experiment.execution import options_of
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.policy import policy
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Arrays, cached
from ptq_exp.quantization import Rule, calibrate_, quantize_
from ptq_exp.quantization.specs import QuantSpec, first_match
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.timing import interleaved
from ptq_exp.settings.schema import ExperimentConfig

TURNS = 15
"""Times of which the least counts."""
Settings = Callable[[int], ExperimentConfig]


def latency_table(
    run: Run, at: Settings, candidates: int, groups: Sequence[Sequence[str]]
) -> tuple[np.ndarray, float]:
    """Time every group of layers at every candidate on the runtime of the settings.

    A layer is executed alone, on as many samples as a batch of images needs; layers of the same shapes are timed once.
    What the network takes beyond its layers is the time of the whole network at the first candidate less theirs. The
    table is kept in the cache, so that a second run chooses the same.

    Args:
        at: number of a candidate -> settings with that candidate for all groups.

    Returns:
        Milliseconds [G, C], and those of all that is not in the groups.
    """
    first = at(0)
    runtime, batch = first.runtime, first.evaluation.batch_size * (1 if run.guidance_scale == 1 else 2)
    key = {
        "model": run.model.digest, "runtime": [runtime.name, runtime.options], "batch": batch,
        "threads": torch.get_num_threads(), "machine": [platform.node(), platform.processor(), platform.machine()],
        "groups": [list(group) for group in groups], "settings": [_deciding(at(c)) for c in range(candidates)],
    }

    def make(folder: Path) -> Arrays:
        call = run.noise(batch, torch.Generator().manual_seed(0))
        layers = [name for group in groups for name in group]
        inputs = _inputs(run.model.denoiser.to(run.device), call, layers)
        table = [_times(run, at(c), layers, inputs) for c in range(candidates)]
        cost = np.array([[sum(times[name] for name in group) for times in table] for group in groups])
        return {"cost": cost, "fixed": np.array(max(0.0, _whole(run, first, call) - cost[:, 0].sum()))}

    found = cached(run.cache, "latency", key, make, f"latency of layers on {runtime.name}")
    return np.array(found["cost"]), float(found["fixed"])


def _deciding(config: ExperimentConfig) -> list[Any]:
    return [sorted(config.bits.groups.items(), key=str), str(config.quantization)]


def _inputs(network: nn.Module, call: Call, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return what each layer reads."""
    found: dict[str, Tensor] = {}
    with watching(network) as watch:
        for name in layers:
            watch(network.get_submodule(name), before=lambda x, name=name: found.__setitem__(name, x.detach().clone()))
        call.evaluate(network)
    return found


def _times(run: Run, config: ExperimentConfig, layers: Sequence[str], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return the milliseconds of each layer alone."""
    network = run.network_copy()
    rules = policy(_static(config, run), run.model, network, run.example())
    found: dict[tuple, float] = {}
    times = {}
    with run.progress(len(layers), "latency of layers") as bar:
        for name in layers:
            layer, spec, x = network.get_submodule(name), first_match(rules, name).spec, inputs[name]
            key = (layer.extra_repr(), type(layer), x.shape, x.stride(), spec)
            if key not in found:
                found[key] = _alone(config, run, layer, spec, x)
            times[name] = found[key]
            bar.update()
    return times


def _alone(config: ExperimentConfig, run: Run, layer: nn.Module, spec: QuantSpec, x: Tensor) -> float:
    network = nn.Sequential(copy.deepcopy(layer)).eval()
    # its output is an operand of attention, which is not here
    rules = [Rule("0", replace(spec, output=None, softmax=None, product=None, is_operand=False))]
    return _timed(config, run, network, rules, (x,), (x[:1],))


def _whole(run: Run, config: ExperimentConfig, call: Call) -> float:
    network = run.network_copy()
    rules = policy(_static(config, run), run.model, network, run.example())
    return _timed(config, run, network, rules, tuple(call), tuple(call.mapped(lambda tensor: tensor[:1])))


@torch.no_grad()
def _timed(
    config: ExperimentConfig, run: Run, network: nn.Module, rules: list[Rule], call: tuple, example: tuple
) -> float:
    """Return the milliseconds of a network on `call`; `example`: one sample of it."""
    quantize_(network, rules, example)
    calibrate_(network, "minmax", [call])
    runtime = runtime_of(config.runtime.name, options_of(config.runtime.name, config.runtime.options, run))
    made = runtime.compile(network, example)
    return min(interleaved({"layer": partial(evaluate, made, call)}, TURNS)["layer"].ms)  # other load only adds


def _static(config: ExperimentConfig, run: Run) -> Plan:
    """Return the plan with one range in all steps: which one is in force changes no time."""
    plan = Plan.of(config, run.grid)
    return replace(plan, quantization=replace(plan.quantization, temporal="static"),
                   time_bins=torch.zeros_like(plan.time_bins))
