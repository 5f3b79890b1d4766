"""Arguments of calls as plain values for JSON; tensors, arrays and pictures among them in a file of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ptq_exp.errors import ConfigError, DataError

ARGUMENTS_FILE = "arguments.safetensors"
_MODES = ("L", "RGB", "RGBA")


def to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as plain values for JSON.

    Args:
        name: of the argument, for messages and for what is put into `tensors`.
        tensors: receives what JSON does not hold; the plain values refer to it.

    Raises:
        ConfigError: a value of a kind that cannot be saved, such as a function.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [to_json(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": to_json(list(value), name, tensors)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_json(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    kind = _kind(value)
    if kind is None:
        raise ConfigError(f"{name} is a {type(value).__name__}, which cannot be saved with the model: leave it out")
    array = value.detach().cpu().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    tensors[name] = array.contiguous()
    return {kind: name}


def from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `to_json`.

    Raises:
        DataError: no value that `to_json` gives, or a tensor is missing.
    """
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise DataError(f"no argument of a call: {', '.join(map(str, value))}")
    (kind, inner), = value.items()
    if kind == "tuple":
        return tuple(from_json(inner, tensors))
    if kind == "dict":
        return {key: from_json(item, tensors) for key, item in inner.items()}
    if kind == "float":
        return float(inner)
    if kind == "dtype":
        return dtype_of(inner)
    if kind not in ("tensor", "array", "picture") or inner not in tensors:
        raise DataError(f"no argument of a call: {kind} {inner}")
    if kind == "tensor":
        return tensors[inner]
    array = tensors[inner].numpy()
    return Image.fromarray(array) if kind == "picture" else array


def dtype_of(name: Any) -> torch.dtype:
    """Return the type of torch with this name, such as "bfloat16".

    Raises:
        DataError: there is none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise DataError(f"{name} is no type of torch")
    return found


def _kind(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Image.Image):
        return "picture" if value.mode in _MODES else None
    return "array" if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object else None
