"""The model of a diffusers folder without its weights: what a saved quantized model needs to be built again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.zoo.build import random_weights
from ptq_exp.diffusion.zoo.folder import diffusers_folder
from ptq_exp.errors import CheckpointError, ConfigError

_FILES = ("config.json", "scheduler_config.json", "model_index.json")


def model_of_structure(structure: Mapping[str, Any], *, name: str, dtype: str, where: str) -> DiffusionModel:
    """The model whose `DiffusionModel.structure` is given, with random weights.

    The settings are read by the reader of diffusers folders: whatever it understands of a folder, it understands here.
    They name no code: only classes that the reader knows are built.

    Args:
        structure: relative path of a settings file -> its content.
        name, dtype: see `diffusers_folder`.
        where: where `structure` was read, for the messages.

    Raises:
        CheckpointError: `structure` is not that of a folder.
    """
    with tempfile.TemporaryDirectory() as root:
        for path, settings in structure.items():
            *folders, file_name = PurePosixPath(path).parts or ("",)
            known = file_name in _FILES and len(folders) < 2 and all(map(str.isidentifier, folders))
            if not known or not isinstance(settings, dict):
                raise CheckpointError(f"{where}: {path!r} is no settings file of a diffusers folder")
            file = Path(root, path)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(settings), encoding="utf-8")
        try:
            with random_weights():
                return diffusers_folder(root, name=name, dtype=dtype)
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{where}: {str(error).replace(root, 'FOLDER')}") from error
