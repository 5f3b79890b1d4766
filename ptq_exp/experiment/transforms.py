"""Before quantizers are placed: the transforms of `quantization.transforms`, fitted on the calibration set."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.experiment.run import Setup
from ptq_exp.quantization import Applied, Fitting, Rule, Transform, transforms_of
from ptq_exp.quantization.cost.macs import trace
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays

log = logging.getLogger("ptq_exp")


@torch.no_grad()
def transform_(
    setup: Setup, network: nn.Module, calibration_set: CalibrationSet, calibration_round: int, rules: list[Rule]
) -> tuple[Applied, ...]:
    """Transform the full-precision `network` in place, and return what was done.

    Only what was fitted is kept for later runs: it is applied to the full-precision weights anew.

    Args:
        rules: that will place the quantizers.
    """

    def run(network: nn.Module) -> None:
        for x, t, y in calibration_set.batches(setup.config.calibration.batch_size):
            network(x.to(setup.device), t.to(setup.device), None if y is None else y.to(setup.device))

    example = tuple(part.to(setup.device) for part in setup.model.example_inputs())
    wanted = transforms_of(setup.config.quantization.transforms)
    macs = trace(network, example).layer_macs if wanted else {}
    applied: list[Applied] = []
    for transform in wanted:
        sites = transform.find(network, example)

        def make(transform: Transform = transform, sites=sites) -> dict[str, np.ndarray]:
            fitted = transform.fit(network, sites, Fitting(run, rules))
            return {name: tensor.cpu().numpy() for name, tensor in fitted.items()}

        spec = _spec(setup, calibration_round, [*(made.transform for made in applied), transform])
        arrays, _ = setup.cache.get_or_make(
            "transform", spec, make=make, load=npz_arrays, save=lambda arrays, path: write_npz(path, **arrays)
        )
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        applied.append(Applied(transform, sites, tensors, transform.cost(network, sites, macs)))
        applied[-1].apply_(network)
        places = "; ".join(f"{site} -> {', '.join(layers)}" for site, layers in sites.items())
        log.info("quantization.transforms: %s: %d places qualify: %s", transform.name, len(sites), places or "none")
    return tuple(applied)


def _spec(setup: Setup, calibration_round: int, transforms: list[Transform]) -> dict[str, Any]:
    """All that decides what is fitted for the last of `transforms`."""
    uses_rules = any(transform.uses_rules for transform in transforms)
    spec = setup.ranges_spec(calibration_round) if uses_rules else setup.calibration_spec(calibration_round)
    return spec | {"transforms": [transform.to_dict() for transform in transforms]}


def transformed(setup: Setup, transforms: tuple[Applied, ...]) -> nn.Module:
    """The full-precision network that was quantized: the model's own denoiser, or a copy of it with `transforms`."""
    if not transforms:
        return setup.model.denoiser
    network = setup.model.twin().to(setup.device)
    with torch.no_grad():
        for applied in transforms:
            applied.apply_(network)
    return network
