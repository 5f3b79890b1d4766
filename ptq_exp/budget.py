"""The bit operations of a configuration, known before anything is computed, and the limit that they may have."""

from __future__ import annotations

import warnings

import torch

from ptq_exp.errors import InfeasibleError
from ptq_exp.policy import policy
from ptq_exp.quantization import quantize_
from ptq_exp.setup import Setup
from ptq_exp.tracking.results import Results


def check_budget(setup: Setup, results: Results) -> None:
    """End the run where `bits.min_bops_ratio` is set and not met; results.json says by how much, as `budget`.

    Raises:
        InfeasibleError: the quantized network would take more bit operations than allowed.
    """
    wanted = setup.config.bits.min_bops_ratio
    if wanted is None or setup.artifact is not None:
        return
    totals = planned_totals(setup)
    ratio = totals["bops_reduction"]["conv_linear"]
    results.update("budget", budget={"bops": totals["bops"], "bops_ratio": ratio, "min_bops_ratio": wanted})
    if ratio < wanted:
        raise InfeasibleError(
            f"bits.min_bops_ratio={wanted:g} is not met: convolutions and linear layers take FP32 / {ratio:.2f} bit "
            "operations; choose lower bits"
        )


def planned_totals(setup: Setup) -> dict:
    """The totals of the report that the quantized network will have, from shapes alone; see `Report.totals`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = setup.model.twin().to("meta")
    example = tuple(torch.empty_like(part, device="meta") for part in setup.model.example_inputs())
    return quantize_(network, policy(setup, network, example), example).totals
