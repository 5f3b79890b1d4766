"""Weights of networks that judge images, from files of the user's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ptq_exp.errors import CheckpointError


def read_tensors(path: Path, setting: str, expected: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a PyTorch or safetensors file by name, without running code that it may contain.

    Args:
        setting: that names the file; the message begins with it.
        expected: what file the user is to give, for the message.

    Raises:
        CheckpointError: no such file, damaged, or no tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"{setting}={path}: no such file; expected {expected}")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises nearly anything on a foreign or damaged file
        raise CheckpointError(
            f"{setting}={path}: damaged, or no file of plain PyTorch weights; expected {expected}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{setting}={path}: found {found}, not tensors by name; expected {expected}")
    return state
