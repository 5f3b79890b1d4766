"""Ranges and transforms of a network larger than memory: the same numbers, found block by block.

Each block is in memory once per stage: the blocks before it answer from disk (`ptq_exp.quantization.offload`). What was
found for a block is written at once, so that a killed run goes on with the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet, check_bins
from ptq_exp.diffusion import Call
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.ranges import states_of_bins
from ptq_exp.experiment.run import Run
from ptq_exp.lightning import Bar
from ptq_exp.quantization import (
    ActivationQuantizer,
    Fitting,
    Rule,
    Transform,
    calibrate_weights_,
    calibrating,
    finish_calibration,
    quantizers,
)
from ptq_exp.quantization.offload import Answers, blocks_in_order, bring_in, last_readers, release, without
from ptq_exp.quantization.stored import range_arrays, restore_ranges_
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays

log = logging.getLogger("ptq_exp")

_ANSWERS = "answers"


def blocks_of_network(run: Run, network: nn.Module) -> tuple[list[str], dict[str, str | None]]:
    """Return the blocks of `network` in execution order, and who reads their answers last.

    Raises:
        ConfigError: it has none that its weights could be divided by.
    """
    names = blocks_in_order(network, run.model.blocks, run.example())
    if not names:
        raise ConfigError(
            f"trainer.max_memory_gb: no module of {run.model.name} that one evaluation calls once is named "
            f"{' or '.join(run.model.blocks)}: set trainer.max_memory_gb=null"
        )
    return names, last_readers(network, names, run.example())


class _Passes:
    """Passes of a calibration set through a network: as far as one block, those before it answer from disk.

    Attributes:
        names: of the blocks, in execution order.
        shown: those that all calls have reached.
    """

    def __init__(self, run: Run, plan: Plan, network: nn.Module, states: CalibrationSet, folder: Path) -> None:
        self.run, self.plan, self.network, self.states, self.folder = run, plan, network, states, folder
        self.names, readers = blocks_of_network(run, network)
        self.answers, self.shown = Answers(folder / _ANSWERS, readers), set()

    def path(self, name: str) -> Path:
        """Return the file of what is found for a block."""
        return self.folder / f"{self.names.index(name):04d}.npz"

    def calls(self, states: CalibrationSet) -> Iterator[Call]:
        """Yield the calls of `states` on the device."""
        return (call.to(self.run.device) for call in states.batches(self.plan.batch_size))

    def show(self, name: str | None) -> None:
        """Run the network on all calls as far as its block `name`, and keep what that answers; None = to the end."""
        self.shown.add(name)
        for number, call in enumerate(self.calls(self.states)):
            self.answers.run(self.network, name, number, call)

    def observe(self, name: str | None, part: nn.Module, chosen: set[str], bar: Bar) -> None:
        """Find the ranges of the quantizers `chosen`, all of `part`, as `show` does, bin by bin."""
        number = 0
        for states in states_of_bins(self.plan, self.network, self.states):
            with calibrating(self.network, chosen):
                for call in self.calls(states):
                    self.answers.run(self.network, name, number, call)
                    number += 1
            bar.update(len(states))
            finish_calibration(part, self.plan.metric)

    def whole(self, network: nn.Module) -> None:
        """Run all of the network on all calls, every block anew."""
        for call in self.calls(self.states):
            call.evaluate(network)


def calibrate_blocks(run: Run, plan: Plan, network: nn.Module, calibration_set: CalibrationSet, folder: Path) -> None:
    """Search the ranges that `ranges.calibrate` finds, block by block.

    Args:
        folder: where a killed run finds the ranges of finished blocks again.

    Raises:
        ConfigError: layers of the time alone are to be calibrated on all times: they lie in all blocks.
        DataError: a bin has no states.
    """
    check_blockwise(plan)
    check_bins(plan.time_bins, torch.from_numpy(np.array(calibration_set.step)))
    passes, observed = _Passes(run, plan, network, calibration_set, folder), _observed(network)
    names, outside = passes.names, without(network, passes.names)
    calibrate_weights_(outside, plan.metric)
    with run.progress((len(names) + 1) * len(calibration_set), "ranges, block by block") as bar:
        for name in names:
            part, path = network.get_submodule(name), passes.path(name)
            if path.exists():
                restore_ranges_(part, npz_arrays(path))
                bar.update(len(calibration_set))
            else:
                bring_in(part)
                calibrate_weights_(part, plan.metric)
                if observed:
                    passes.observe(name, part, {q for q in observed if q.startswith(f"{name}.")}, bar)
                    passes.answers.finish(name)
                else:
                    finish_calibration(part, plan.metric)
                write_npz(path, **range_arrays(part))
            release(part)
        if observed:
            others = {q for q in observed if not any(q.startswith(f"{name}.") for name in names)}
            passes.observe(None, outside, others, bar)
        else:
            finish_calibration(outside, plan.metric)


def fit_blocks(
    run: Run, plan: Plan, network: nn.Module, transform: Transform, sites: Mapping[str, tuple[str, ...]],
    rules: list[Rule], calibration_set: CalibrationSet, folder: Path,
) -> dict[str, torch.Tensor]:
    """Fit `transform` to its `sites` as `Transform.fit` does at once, block by block.

    Sites that reach over several blocks are fitted on forwards of the whole network.
    """
    passes = _Passes(run, plan, network, calibration_set, folder)
    names, tensors = passes.names, {}
    of_block = {site: _block_of(site, layers, names) for site, layers in sites.items()}

    def fit(chosen: str, run_all: Callable[[nn.Module], object]) -> dict[str, torch.Tensor]:
        own = {site: layers for site, layers in sites.items() if of_block[site] == chosen}
        return transform.fit(network, own, Fitting(run_all, rules)) if own else {}

    reached = [n for n, name in enumerate(names) if name in of_block.values() or _OUTSIDE in of_block.values()]
    for name in names[: reached[-1] + 1] if reached else ():
        path = passes.path(name)
        if not path.exists():
            found = fit(name, lambda _, name=name: passes.show(name))
            if name not in passes.shown:  # nothing to fit, or nothing of it depends on data
                passes.show(name)
            passes.answers.finish(name)
            write_npz(path, **{key: tensor.cpu().numpy() for key, tensor in found.items()})
            release(network.get_submodule(name))
        tensors |= {key: torch.from_numpy(np.array(array)) for key, array in npz_arrays(path).items()}
    return tensors | fit(_OUTSIDE, lambda _: passes.show(None)) | fit(_SEVERAL, passes.whole)


_OUTSIDE, _SEVERAL = "", "*"
"""In the place of a block's name: the layers of a site lie in none, or in several."""


def _block_of(site: str, layers: tuple[str, ...], names: list[str]) -> str:
    """Return the block in which all of a site lies."""
    makers = () if " " in site or site.isdigit() else (site,)  # else it is what several layers have in common
    own = {next((name for name in names if layer.startswith(f"{name}.") or layer == name), _OUTSIDE)
           for layer in (*layers, *makers)}
    return own.pop() if len(own) == 1 else _SEVERAL


def check_blockwise(plan: Plan) -> None:
    """Raise ConfigError for settings that need all blocks at once."""
    if plan.quantization.time_layers == "all_steps":
        raise ConfigError(
            "quantization.time_layers=all_steps: layers of the time lie in all blocks, of which trainer.max_memory_gb "
            "holds one at a time: set quantization.time_layers=calibration_set, or trainer.max_memory_gb=null"
        )


def _observed(network: nn.Module) -> set[str]:
    """Return the names of the activation quantizers; none where no range of theirs has to be found from data."""
    found = {name: q for name, q in quantizers(network) if isinstance(q, ActivationQuantizer)}
    return set(found) if any(q.needs_data for q in found.values()) else set()

