"""What a pipeline is asked to draw: prompts, classes or images, one request for each image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_exp.errors import ConfigError, DataError, one_line

Request = Mapping[str, Any]
"""Arguments of the pipeline for one image, such as {"prompt": "a red fox"} or {"class_labels": 3}."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".npy")


def requests_of(prompts: Sequence[str | Request] | str | Path | None) -> tuple[Request, ...]:
    """Return the requests that `prompts` holds; () of None.

    Args:
        prompts: texts, requests, or a file: `.txt`, one prompt in each line; `.json`, a list, or `.jsonl`, one in each
            line, of prompts or requests. Names of picture files in a request are opened, beside the file of prompts.

    Raises:
        DataError: the file cannot be read, or holds something else.
        ConfigError: there are none.
    """
    if prompts is None:
        return ()
    folder = Path()
    if isinstance(prompts, (str, Path)):
        folder, prompts = Path(prompts).parent, _read(Path(prompts))
    found = tuple({"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts)
    if not found:
        raise ConfigError("model.prompts: there are none; give at least one")
    names = set(found[0])
    for number, request in enumerate(found):
        if set(request) != names:
            raise ConfigError(
                f"model.prompts: number {number} has {', '.join(sorted(request))}, the first {', '.join(sorted(names))}"
            )
    return tuple(opened(request, folder) for request in found)


def opened(arguments: Request, folder: Path = Path()) -> dict[str, Any]:
    """Return `arguments` with pictures in place of their files' names."""
    return {
        name: _picture(name, folder / value) if isinstance(value, str) and value.lower().endswith(_PICTURES) else value
        for name, value in arguments.items()
    }


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"model.prompts={path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, list) or not all(isinstance(item, (str, dict)) for item in found):
        raise DataError(f"model.prompts={path}: expected a list of prompts, or of arguments of the pipeline by name")
    return found


def _picture(name: str, path: Path) -> Any:
    """Open a picture in RGB, or (control_image, masks in .npy) an array float [H, W] or [H, W, C] in [0, 1]."""
    from PIL import Image

    try:
        if path.suffix == ".npy":
            import numpy as np

            return np.load(path, allow_pickle=False)
        with Image.open(path) as picture:
            return picture.convert("L" if "mask" in name else "RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{name}={path} is no picture that can be read: {one_line(error)}") from error
