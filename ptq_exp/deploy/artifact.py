"""`Artifact`: a saved quantized model as it lies on disk, and what it may be combined with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptq_exp.correction import BitSchedule, NoiseStatistics
from ptq_exp.deploy.arguments import ARGUMENTS_FILE, from_json
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.errors import CheckpointError, ConfigError, DataError, one_line
from ptq_exp.quantization import Applied, applied_from_dict
from ptq_exp.quantization.save import COMPONENT_TENSORS_FILE, DESCRIPTION_FILE, TENSORS_FILE, read_description
from ptq_exp.storage.atomic import file_digest

SUBFOLDER, PIPELINE_FILE = "quantized", "model_index.json"
SCHEDULE_FILE, STATISTICS_FILE = "bit_schedule.json", "noise_statistics.npz"
SECTIONS = ("seed", "model", "sampler", "calibration", "metric", "bits", "quantization", "reconstruction", "correction")
OF_MODEL = ("name", "checkpoint", "dtype", "ema", "conditions", "prompts", "call", "config", "component",
            "channels_last", "compile")
"""The settings that are saved with a model. No others are taken from a file: some name code that a run executes."""
_EXPECTED = {
    "model.name": str, "model.digest": str, "model.dtype": str, "model.options": dict, "settings.model": dict,
    "settings.sampler": dict, "settings.bits": dict, "settings.bits.name": str, "settings.correction": dict,
    "grid": dict, "activation_widths": list, "evaluations": int, "bit_schedule": dict | None,
    "noise_statistics": dict | None,
}


@dataclass(frozen=True)
class Artifact:
    """The files of a saved model and the content of its quantization.json; open one with `Artifact.open`."""

    folder: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Return the saved model in `path`: a run folder, its sub-folder `quantized`, a pipeline or its component.

        Raises:
            DataError: there is none, or it is damaged, incomplete or of an unknown version.
        """
        folder = _folder_of(Path(path))
        tensors_file = COMPONENT_TENSORS_FILE if (folder / "config.json").exists() else TENSORS_FILE
        for name in (DESCRIPTION_FILE, tensors_file):
            if not (folder / name).is_file():
                raise DataError(
                    f"quantized={path} holds no saved model, {name} is missing: give the folder of a run with "
                    f"save_quantized=true, or its sub-folder {SUBFOLDER}"
                )
        description = read_description(folder)
        for name, kind in _EXPECTED.items():
            found = description
            for key in name.split("."):
                found = found.get(key, ...) if isinstance(found, dict) else ...
            if not isinstance(found, kind):
                raise DataError(f"{folder / DESCRIPTION_FILE} is damaged: {name} is missing or of another type")
        if not isinstance(description["model"].get("structure"), dict | None):
            raise DataError(f"{folder / DESCRIPTION_FILE} is damaged: model.structure is of another type")
        settings = description["settings"]
        of_model = set(settings["model"]) - set(OF_MODEL)
        if foreign := [*(set(settings) - set(SECTIONS)), *(f"model.{key}" for key in of_model)]:
            raise DataError(f"{folder / DESCRIPTION_FILE} is damaged: {min(foreign)} is no setting of a saved model")
        return cls(folder, description)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Name, digest and build options of the model."""
        return self.description["model"]

    @property
    def structure(self) -> Mapping[str, Any] | None:
        """The settings files of the folder that the model was read from; None = its name says all, or nobody knows."""
        return self.identity.get("structure")

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the model was made from, as the settings of the run named it."""
        found = self.description["settings"]["model"].get("checkpoint")
        return found if isinstance(found, str) else None

    @property
    def digest(self) -> str:
        """SHA-256 of the file of tensors."""
        return self.description["file"]["sha256"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the network was made with, section by section, as they are to be used from now on.

        Of a pipeline those are left out that were arguments in Python. A bit schedule is spelt out and noise
        statistics are the saved ones, whatever they had been made from.
        """
        settings = copy.deepcopy(dict(self.description["settings"]))
        if (schedule := self.schedule()) is not None:
            widths = list(self.description["activation_widths"])
            settings["bits"] |= {"schedule": list(schedule.activation), "candidates": widths}
        if self.description["noise_statistics"] is not None:
            settings["correction"]["statistics"] = str(self.folder / STATISTICS_FILE)
        if self.identity.get("target") == "ptq_exp.load_model" and self.description.get("pipeline") is not None:
            given = {key: value for key, value in settings["model"].items() if value is not None}
            settings["model"] = {key: value for key, value in given.items() if key != "name"}
        return settings

    def setting(self, name: str, kind: type | UnionType, default: Any) -> Any:
        """Return a setting that the network was made with, such as "sampler.steps"; `default` where it is not recorded.

        Raises:
            DataError: it is of another type than `kind`.
        """
        section, key = name.split(".")
        values = self.description["settings"].get(section, {})
        found = values.get(key, default) if isinstance(values, dict) else ...
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise DataError(f"{self.folder / DESCRIPTION_FILE}: its settings do not fit: {name} is of another type")
        return found

    def schedule(self) -> BitSchedule | None:
        """Return the activation widths per step; None = one width.

        Raises:
            DataError: its file is missing, or is not the one that was saved.
        """
        return self._beside("bit_schedule", SCHEDULE_FILE, BitSchedule.load)

    def statistics(self) -> NoiseStatistics | None:
        """Return the noise statistics; None = no correction. Raises as `schedule`."""
        return self._beside("noise_statistics", STATISTICS_FILE, NoiseStatistics.load)

    def transforms(self) -> tuple[Applied, ...]:
        """Return the transforms that the network went through before it was quantized, without what was fitted.

        Raises:
            DataError: one is unknown here, or its record is damaged.
        """
        records, sites = self.description.get("transforms"), self.description.get("smoothed")
        if records is None:  # earlier versions knew smoothing alone, and at first did not record it
            alpha = self.description["settings"].get("quantization", {}).get("smooth_alpha", 0.5)
            records = [{"name": "smooth", "alpha": alpha, "sites": sites, "macs": 0, "bytes": 0}] if sites else []
        try:
            return tuple(applied_from_dict(record) for record in records)
        except (DataError, TypeError) as error:
            raise DataError(f"{self.folder / DESCRIPTION_FILE}: {error}") from error

    def check_model(self, model: DiffusionModel, setting: str = "model.checkpoint") -> None:
        """Raise CheckpointError unless `model` has the weights that were quantized."""
        if model.digest != self.identity["digest"]:
            raise CheckpointError(
                f"{self.folder} was quantized from weights of {self.identity['name']} with the digest "
                f"{_short(self.identity['digest'])}, this model {model.name} has {_short(model.digest)}: set {setting} "
                "to the checkpoint that it was made from"
            )

    def check_grid(self, grid: TimeGrid, guidance_scale: float) -> None:
        """Raise ConfigError if schedule, ranges of steps or statistics were made for another sampler than this one."""
        if (schedule := self.schedule()) is not None:
            schedule.check(grid)
        temporal = self.setting("quantization.temporal", str, "static")
        if temporal != "static" and not _same(self.description["grid"]["timesteps"], grid.timesteps.tolist()):
            raise ConfigError(
                f"{self.folder} has ranges for each sampling step (quantization.temporal={temporal}) of another grid "
                "than this one: leave out sampler.steps and sampler.spacing, or quantize again with them"
            )
        if self.description["noise_statistics"] is None:
            return
        wanted = grid_entry(grid, guidance_scale)
        for key, found in self.description["grid"].items():
            if not _same(found, wanted.get(key)):
                raise ConfigError(
                    f"{self.folder / STATISTICS_FILE} was made for another {key} of the sampler: leave out the sampler "
                    "settings, or quantize again with them"
                )

    def grid(self) -> TimeGrid:
        """Return the times of a pipeline's steps, which no noise schedule says.

        Raises:
            DataError: they are damaged.
        """
        try:
            return TimeGrid.from_dict(self.description["grid"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.folder / DESCRIPTION_FILE} is damaged: grid: {one_line(repr(error))}") from error

    def arguments(self, key: str) -> Any:
        """Return what was saved of the calls of a pipeline or network: "example" or "pipeline"; None = nothing.

        Raises:
            DataError: it is damaged, or the file beside is missing or another one.
        """
        entry = self.description.get(key)
        if entry is None:
            return None
        try:
            return from_json(entry, self._beside("arguments", ARGUMENTS_FILE, load_file))
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, DataError) as error:
            if isinstance(error, DataError) and ARGUMENTS_FILE in str(error):
                raise
            raise DataError(f"{self.folder / DESCRIPTION_FILE} is damaged: {key}: {one_line(error)}") from error

    def _beside(self, key: str, name: str, load):
        entry = self.description[key]
        if entry is None:
            return None
        if not (self.folder / name).is_file():
            raise DataError(f"{self.folder / name} is missing: copy all files of the saved model again")
        if file_digest(self.folder / name) != entry.get("sha256"):
            raise DataError(f"{self.folder / name} is not the file that {DESCRIPTION_FILE} describes: copy both again")
        return load(self.folder / name)


def _folder_of(path: Path) -> Path:
    """Return the folder of the quantized network's files in a run folder, a pipeline, or the folder itself."""
    for folder in (path / SUBFOLDER, path):
        if (folder / DESCRIPTION_FILE).exists() and folder != path:
            return folder
        if (folder / PIPELINE_FILE).exists():
            found = sorted(file.parent for file in folder.glob(f"*/{DESCRIPTION_FILE}"))
            return found[0] if found else folder
    return path


def grid_entry(grid: TimeGrid, guidance_scale: float) -> dict[str, Any]:
    """Return what of a sampler noise statistics depend on."""
    return grid.to_dict() | {"guidance_scale": guidance_scale}


def _same(found: Any, wanted: Any) -> bool:
    """Whether two values agree; lists of numbers up to the rounding of another machine."""
    if not isinstance(found, list) or not isinstance(wanted, list):
        return found == wanted
    return len(found) == len(wanted) and np.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def _short(digest: str) -> str:
    return digest if digest.startswith("random-") else digest[:12]
