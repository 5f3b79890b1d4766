"""Before quantizers are placed: the transforms of `quantization.transforms`, fitted on the calibration set."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.experiment.blockwise import fit_blocks
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import cached
from ptq_exp.quantization import Applied, Fitting, Rule, Transform, applied_to, transforms_of

log = logging.getLogger("ptq_exp")


@torch.no_grad()
def transform_(
    run: Run, plan: Plan, keys: Keys, network: nn.Module, calibration_set: CalibrationSet, calibration_round: int,
    rules: list[Rule],
) -> tuple[Applied, ...]:
    """Transform the full-precision `network` in place, and return what was done.

    Only what was fitted is kept for later runs: it is applied to the full-precision weights anew.

    Args:
        rules: that will place the quantizers.
    """

    def show(network: nn.Module) -> None:
        for call in calibration_set.batches(plan.batch_size):
            call.to(run.device).evaluate(network)

    example = run.example()
    applied: list[Applied] = []
    for transform in transforms_of(plan.quantization.transforms):
        sites, left = transform.chosen(transform.find(network, example), rules), transform.left(network, example)

        def make(folder: Path, transform: Transform = transform, sites=sites) -> dict[str, np.ndarray]:
            if run.blockwise:
                fitted = fit_blocks(run, plan, network, transform, sites, rules, calibration_set, folder)
            else:
                fitted = transform.fit(network, sites, Fitting(show, rules))
            return {name: tensor.cpu().numpy() for name, tensor in fitted.items()}

        key = keys.transform(calibration_round, [*(done.transform for done in applied), transform])
        arrays = cached(run.cache, "transform", key, make, f"transform {transform.name}")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        applied.append(applied_to(network, example, Applied(transform, sites, tensors, left=left)))
        places = [site if layers == (site,) else f"{site} -> {_some(layers)}" for site, layers in sites.items()]
        log.info("quantization.transforms: %s: %d places qualify: %s", transform.name, len(sites),
                 _some(tuple(places), 4, "; ") or "none")
        for name, reason in left.items():
            log.info("quantization.transforms: %s: %s: %s", transform.name, name, reason)
    return tuple(applied)


def _some(names: tuple[str, ...], most: int = 8, between: str = ", ") -> str:
    """Return the first names, and how many others there are; results.json has all."""
    others = len(names) - most
    return between.join(names[:most]) + (f" and {others} others" if others > 0 else "")


def transformed(run: Run, transforms: tuple[Applied, ...]) -> nn.Module:
    """Return the full-precision network that was quantized: the model's own, or a copy of it with `transforms`."""
    if not transforms:
        return run.model.denoiser
    network = run.network_copy()
    with torch.no_grad():
        for applied in transforms:
            applied.apply_(network)
    return network
