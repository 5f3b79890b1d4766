"""Parts of a diffusers folder: loaded without leftovers, never run as code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ptq_exp.diffusion.zoo.weights import STEM, damage, find_weights
from ptq_exp.errors import CheckpointError
from ptq_exp.files import file_digest


def load_component(cls: type[nn.Module], root: Path, component: str) -> nn.Module:
    """A module of class `cls` in float32 from `root/component` (or `root` itself, for early repositories).

    Raises:
        CheckpointError: weights are missing, left over, of another shape, or in a file that cannot be read safely.
    """
    folder = component_folder(root, component)
    try:
        weights = find_weights(folder)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"model.checkpoint={folder}: ")
        raise CheckpointError(f"model.checkpoint={folder}: not a complete {cls.__name__}: {reason}") from error
    try:
        module, info = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32,
            low_cpu_mem_usage=False, variant=weights.variant, use_safetensors=weights.safe,
        )  # fmt: skip
    except Exception as error:  # whatever a damaged folder makes the library stumble over
        reason = damage(weights.files) or " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"model.checkpoint={folder}: not a complete {cls.__name__} of its config.json ({reason})"
        ) from error
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
        for path in sorted([*folder.glob(f"{STEM}*"), *folder.glob("*config.json")]):
            digest.update(f"{component}/{path.name}".encode())
            digest.update(file_digest(path).encode())
    return digest.hexdigest()
