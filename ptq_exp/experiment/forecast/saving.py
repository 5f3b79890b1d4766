"""How long saving a quantized network in files takes: one block is saved, and all others count in proportion."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ptq_exp.experiment.forecast.first_blocks import FirstBlocks, within
from ptq_exp.experiment.forecast.probe import measured
from ptq_exp.quantization import Report, save_quantized
from ptq_exp.quantization.save import read_description


def saving_seconds(first: FirstBlocks, network: nn.Module, report: Report, folder: Path) -> float:
    """Return the seconds of packing, describing and writing `network`, whose `first` blocks have ranges.

    Args:
        report: of all of its operations.
        folder: where a block is written, and removed again.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def seconds(name: str) -> float:
        rows = tuple(row for row in report.rows if within(row.name, [name]))
        with tempfile.TemporaryDirectory(dir=folder) as place:

            def write() -> None:
                save_quantized(place, network.get_submodule(name), (), replace(report, rows=rows), {})
                read_description(place)  # as a run does, which leaves a copy of it for people

            return measured(write, torch.device("cpu"))[0]

    if len(first.names) > 1:  # what is used first is slow; the block that is timed is read as all others are: once
        seconds(first.names[0])
    return first.in_proportion(network, lambda _: seconds(first.names[-1]))
