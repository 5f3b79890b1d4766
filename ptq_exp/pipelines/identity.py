"""What decides the images of a pipeline, as a hash and as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CHUNK = 1 << 26  # bytes of a tensor that are hashed at a time
_NOTES = ("transformers_version", "torch_dtype", "dtype", "architectures")
"""Settings of a component that say where it comes from, beside those that begin with an underscore."""


def pipeline_digest(pipeline: Any) -> str:
    """Return a SHA-256 of all weights, vocabularies and settings that decide a pipeline's images."""
    components = dict(sorted(pipeline.components.items()))
    own = {key: value for key, value in _settings(pipeline).items() if key not in components}
    digest = hashlib.sha256(_json([type(pipeline).__name__, own]))
    for name, component in components.items():
        if component is None:
            continue
        digest.update(_json([name, type(component).__name__, _settings(component)]))
        if isinstance(component, nn.Module):
            add_weights(digest, component)
        elif callable(getattr(component, "get_vocab", None)):
            digest.update(_json(component.get_vocab()))
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Return values of requests and calls for JSON: pictures and tensors by their content, code by its name."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    elif isinstance(value, (type, Callable)):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    array = np.ascontiguousarray(np.asarray(value))
    if array.dtype == object:
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return hashlib.sha256(_json([array.dtype.str, array.shape]) + array.tobytes()).hexdigest()


def _settings(component: Any) -> dict[str, Any]:
    config = getattr(component, "config", None) or {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in _NOTES}


def add_weights(digest: Any, component: nn.Module) -> None:
    """Add all weights and buffers of a network to a hash."""
    for key, value in component.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        data = value.detach().cpu().contiguous().view(-1)
        if data.numel():
            raw = data.view(torch.uint8) if data.dtype != torch.bool else data.to(torch.uint8)
            for part in raw.split(_CHUNK):
                digest.update(part.numpy())


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
