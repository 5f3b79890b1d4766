"""The folder of a model without its weights: what a saved quantized model needs to be built again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ptq_exp.diffusion.zoo.build import random_weights
from ptq_exp.errors import DataError, PTQError

_FILES = ("config.json", "scheduler_config.json", "model_index.json")


@contextmanager
def folder_of_structure(structure: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield a temporary folder with the settings files of `structure`; a model read from it has random weights.

    So the reader of folders reads what was saved, too. The settings name no code: only classes that it knows are built.

    Args:
        structure: relative path of a settings file -> its content, see `DiffusionModel.structure`.
        where: where `structure` was read, for the messages.

    Raises:
        DataError: `structure` is not that of a folder, or the model in it cannot be built.
    """
    with tempfile.TemporaryDirectory() as root:
        for path, settings in structure.items():
            *folders, file_name = PurePosixPath(path).parts or ("",)
            known = file_name in _FILES and len(folders) < 2 and all(map(str.isidentifier, folders))
            if not known or not isinstance(settings, dict):
                raise DataError(f"{where}: {path!r} is no settings file of a diffusers folder")
            file = Path(root, path)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(settings), encoding="utf-8")
        try:
            with random_weights():
                yield root
        except PTQError as error:
            raise DataError(f"{where}: {str(error).replace(root, 'FOLDER')}") from error
