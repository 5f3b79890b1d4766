"""How long saving a quantized network in files takes: some blocks are saved, and all count in proportion."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from ptq_exp.experiment.forecast.first_blocks import FirstBlocks, within
from ptq_exp.experiment.forecast.probe import measured
from ptq_exp.quantization import Report, save_quantized
from ptq_exp.quantization.save import read_description

_TIMED = 5  # blocks, at most, beside the first


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

    # what is used first is slow, and a disk is fast and slow in turns; each block is read as all others are: once
    found = [seconds(name) for name in first.names[: 1 + _TIMED]]
    return first.in_proportion(network, lambda _: median(found[1:] or found))
