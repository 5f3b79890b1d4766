"""Parts of a diffusers folder: found on disk or in the hub's cache, loaded without leftovers, never run as code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ptq_exp.errors import CheckpointError
from ptq_exp.files import file_digest

_WEIGHTS = "diffusion_pytorch_model"
_SETTINGS = ("config.json", "scheduler_config.json", "*/config.json", "*/scheduler_config.json", "model_index.json")


def local_folder(checkpoint: str) -> Path:
    """The folder `checkpoint`, or the local copy of a repository of that id (downloaded if the hub can be reached).

    Only settings and weights are fetched: safetensors, and pickled tensors where a repository has nothing else.

    Raises:
        CheckpointError: no such folder, and no such repository can be reached.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"model.checkpoint={checkpoint}: a file; the model `diffusers` takes a folder")
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(f"model.checkpoint={checkpoint}: no such folder, and not a repository id (owner/name)")
    try:
        return _snapshot(checkpoint)
    except Exception as error:  # the hub client raises many unrelated kinds: network, cache, permissions, HTTP
        raise CheckpointError(
            f"model.checkpoint={checkpoint}: no such folder, and a repository of that id is neither in the local cache "
            f"nor reachable ({type(error).__name__}); download it and give its folder"
        ) from error


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    for ending in ("safetensors*", "bin"):
        patterns = [*_SETTINGS, *(f"{place}{_WEIGHTS}*.{ending}" for place in ("", "*/"))]
        path = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*non_ema*"]))
        if any(path.rglob(f"{_WEIGHTS}*.{ending.rstrip('*')}")):
            return path
    return path


def read_json(path: Path) -> dict:
    """A settings file of a folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.checkpoint={path.parent}: not a diffusers folder: no {path.name} in it"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.checkpoint={path.parent}: {path.name} is not readable JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"model.checkpoint={path.parent}: {path.name} is not a JSON object")
    return found


def load_component(cls: type[nn.Module], root: Path, component: str) -> nn.Module:
    """A module of class `cls` in float32 from `root/component` (or `root` itself, for early repositories).

    Raises:
        CheckpointError: weights are missing, left over, of another shape, or in a file that cannot be read safely.
    """
    folder = component_folder(root, component)
    try:
        module, info = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # whatever a damaged folder makes the library stumble over
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"model.checkpoint={folder}: not a complete {cls.__name__} ({reason})") from error
    found = {what.removesuffix("_keys"): keys for what, keys in info.items() if keys}
    if found:
        told = "; ".join(f"{len(keys)} {what} ({', '.join(map(str, list(keys)[:3]))})" for what, keys in found.items())
        raise CheckpointError(f"model.checkpoint={folder}: not the weights of its own config.json: {told}")
    return module


def component_folder(root: Path, component: str) -> Path:
    """Where a component of a pipeline lies."""
    return root / component if component and (root / component).is_dir() else root


def component_digest(root: Path, components: Sequence[str]) -> str:
    """SHA-256 over settings and weights of the named components."""
    digest = hashlib.sha256()
    for component in components:
        folder = component_folder(root, component)
        for path in sorted([*folder.glob(f"{_WEIGHTS}*"), *folder.glob("*config.json")]):
            digest.update(f"{component}/{path.name}".encode())
            digest.update(file_digest(path).encode())
    return digest.hexdigest()
