"""What identifies a network in plain operations: its tensors, its settings, and the code of its modules."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from inspect import isroutine
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.storage.atomic import file_digest

_WITHOUT_MEANING = ("_use_default_values",)
"""Attributes that differ between processes: diffusers lists which settings were not given, in the order of a set."""
_digest_of = cache(file_digest)
_PACKAGES = ("torch", "diffusers", "transformers")


def fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) of all that decides what an eval-mode `network` computes.

    That is its tensors bit for bit, all other attributes of its modules and of the objects in them, the files of their
    classes, and the versions of the libraries that these call.
    """
    found = hashlib.sha256()
    _add(found, network, {})
    for line in _code(network):
        found.update(line.encode())
    return found.hexdigest()


def _add(found: Any, value: Any, seen: dict[int, int]) -> None:
    """Feed a value and all that it holds to the hash `found`; what was `seen` before is named by its number."""
    if isinstance(value, Tensor):
        # a copy: a view of one element may have any stride, and counts as contiguous
        values = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        found.update(f"{values.dtype}{tuple(values.shape)}".encode())
        found.update(memoryview(values.flatten().view(torch.uint8).numpy()) if values.numel() else b"")
        return
    parts, name = _parts(value)
    if parts is None:
        found.update(f"{name};".encode())
        return
    if id(value) in seen:
        found.update(f"seen {seen[id(value)]};".encode())
        return
    seen[id(value)] = len(seen)
    found.update(f"{name}(".encode())
    for key, inner in parts:
        found.update(f"{key}=".encode())
        _add(found, inner, seen)
    found.update(b")")


def _parts(value: Any) -> tuple[Iterable[tuple[Any, Any]] | None, str]:
    """Return what an object holds, by name, and what it is called; None = it holds nothing."""
    kind = type(value).__qualname__
    if isinstance(value, Mapping):
        return [(key, inner) for key, inner in value.items() if key not in _WITHOUT_MEANING], kind
    if isinstance(value, list | tuple):
        return list(enumerate(value)), kind
    if isinstance(value, set | frozenset):
        return list(enumerate(sorted(value, key=repr))), kind
    if isinstance(value, type) or isroutine(value):
        return None, f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__"):
        return [(key, inner) for key, inner in sorted(vars(value).items()) if not key.endswith("_hooks")], kind
    return None, repr(value)


def _code(network: nn.Module) -> Iterator[str]:
    """List the files that the classes of a network, and this package's runtime, are written in."""
    files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in network.modules()}
    files |= {str(path) for path in Path(__file__).parent.glob("*.py")}
    for path in sorted(path for path in files if path):
        yield f"{Path(path).name}:{_digest_of(path)}\n"
    for name in _PACKAGES:
        try:
            yield f"{name}:{version(name)}\n"
        except PackageNotFoundError:
            continue
