"""The one place that puts on disk what the stages of a run return."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.deploy.artifact import SUBFOLDER, Artifact
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.stage import Record
from ptq_exp.quantization import range_table
from ptq_exp.quantization.save import DESCRIPTION_FILE
from ptq_exp.results.record import SAMPLES, Results, write_samples
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.storage.plain_json import write_json

log = logging.getLogger("ptq_exp")


class RunWriter:
    """Writes records into the folder of a run, and results.json after every one of them.

    Attributes:
        pictures: names of those that were drawn.
    """

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.pictures: list[str] = []

    def write(self, stage: str, record: Record, **numbers: Any) -> None:
        """Write the files and pictures of a stage, then its entries of results.json."""
        for name, write in record.files.items():
            write(self.folder / name)
        for name, draw in record.pictures.items():
            with spoils_nothing(name, "results.json has its numbers"):
                draw(self.folder / name)
                self.pictures.append(name)
        self.results.update(stage, **{**record.numbers, **numbers})

    def samples(self, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Write images that no stage has drawn into the run folder."""
        write_samples(self.folder / SAMPLES, images, labels)

    def quantized(self, quantized: QuantizedModel) -> Mapping[str, Any]:
        """Save a quantized model in the sub-folder `quantized`; returns the content of its quantization.json.

        The run folder has a copy of it, as of every picture and table that people look for first.
        """
        description = quantized.save(self.folder / SUBFOLDER)
        saved = Artifact.open(self.folder).folder  # of a pipeline that of its component
        shutil.copyfile(saved / DESCRIPTION_FILE, self.folder / DESCRIPTION_FILE)
        size = description["file"]
        log.info(
            "%s: %.3f MB, %+.1f %% of the theoretical %.3f MB", size["name"], size["bytes"] / 1e6,
            100 * (size["bytes"] / size["theoretical_bytes"] - 1), size["theoretical_bytes"] / 1e6,
        )
        return description

    def layers(self, quantized: QuantizedModel) -> None:
        """Write quantization.json of a model that is not saved here: every layer and every range."""
        found = quantized.report.to_dict() | {"quantizers": range_table(quantized.network)}
        found["transforms"] = [done.to_dict() for done in quantized.transforms]
        write_json(self.folder / DESCRIPTION_FILE, found)
