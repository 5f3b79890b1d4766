"""Checkpoint files as flat state dicts, read without running anything that is written in them."""

from __future__ import annotations

import logging
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptq_exp.errors import CheckpointError

log = logging.getLogger(__name__)
_WRAPPERS = ("module.", "_orig_mod.")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|function <[\w-]+ ?(?:function |method |class )?'?([\w.]+)")


class ModelCheckpoint:
    """Stands for Lightning's callback of that name; holds nothing and does nothing."""


class EarlyStopping:
    """Stands for Lightning's callback of that name; holds nothing and does nothing."""


# Lightning 1.x kept the state of callbacks under their classes: published checkpoints name these beside their tensors
_STAND_INS = [
    (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (ModelCheckpoint, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
    (EarlyStopping, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU, memory-mapped where the format allows it.

    Understood are safetensors, and PyTorch files that hold a dict of tensors, `{"state_dict": ...}` (latent diffusion,
    Lightning) or another single state dict, or the training list of the PyTorch DDIM port (its averaged weights are
    taken). `module.` (a data-parallel run) and `_orig_mod.` (a compiled one) before every name are removed. Pickles are
    unpickled by `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: one line that starts with `model.checkpoint=PATH:`; the file is missing, empty, truncated, a
            web page, a Git LFS pointer, a folder, wants to run code, or holds no tensors or several state dicts.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        loaded = _read_safetensors(path)
    elif kind in ("zip", "pickle"):
        loaded = _read_torch(path, mmap=kind == "zip")
    else:
        raise _error(path, kind)
    return _flat(path, loaded)


def is_mapped(path: Path) -> bool:
    """Say whether a checkpoint is mapped into memory; pickles as torch wrote them before 1.6 are read whole."""
    return _kind(path) != "pickle"


def _error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"model.checkpoint={path}: {reason}")


def _kind(path: Path) -> str:
    """`safetensors`, `zip`, `pickle`, or a sentence about what the file is instead."""
    if path.is_dir():
        return "this is a folder; give the checkpoint file itself"
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if size == 0:
        return "the file is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file; run `git lfs pull` or download it again"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not a checkpoint; download the file again (an error or log-in page was saved)"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    return "neither a PyTorch nor a safetensors file"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # whatever damaged bytes make the library stumble over
        raise _error(path, f"not a complete safetensors file ({_line(error)}); download it again") from error


def _read_torch(path: Path, mmap: bool) -> object:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found:
            raise _error(
                path, f"the pickle in it wants {found[1] or found[2]}, which is not needed for tensors; nothing of it "
                "was executed. If you trust the file, convert its tensors to safetensors"
            ) from error
        raise _error(path, f"not a complete PyTorch file ({_line(error)}); download it again") from error
    except Exception as error:  # whatever damaged bytes make the library stumble over
        raise _error(path, f"not a complete PyTorch file ({_line(error)}); download it again") from error


def _line(error: Exception) -> str:
    """Return the first line of a message, shortened: libraries append advice and addresses."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


def _flat(path: Path, loaded: object) -> dict[str, Tensor]:
    """Return the state dict inside one of the known containers."""
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    elif isinstance(loaded, dict) and (nested := _nested(loaded)):
        if len(nested) > 1:
            raise _error(path, f"holds several state dicts ({', '.join(map(str, nested))}); save the one to load alone")
        loaded = loaded[nested[0]]
    elif isinstance(loaded, (list, tuple)):
        loaded = _training_list(path, loaded)
    if not isinstance(loaded, dict):
        raise _error(path, f"no tensors inside (a {type(loaded).__name__} instead of a dict of tensors)")
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise _error(path, "no tensors inside")
    if len(tensors) < len(loaded):
        others = [str(key) for key in loaded if key not in tensors]
        log.info("%s: entries that are no tensors are left aside: %s", path, ", ".join(others[:5]))
    while wrapper := next((name for name in _WRAPPERS if all(key.startswith(name) for key in tensors)), None):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return tensors


def _nested(loaded: dict) -> list:
    """Return the keys of the state dicts inside; none where the weights lie beside them (a counter is no weight)."""
    if any(isinstance(value, Tensor) and value.ndim for value in loaded.values()):
        return []
    return [key for key, value in loaded.items() if _is_state_dict(value)]


def _training_list(path: Path, loaded: list | tuple) -> object:
    """Return the last dict of tensors of [model, optimizer, epoch, step, averaged model]; optimizers nest theirs."""
    states = [item for item in loaded if _is_state_dict(item)]
    if not states:
        raise _error(path, "no tensors inside the list")
    which = "the averaged (EMA) weights, its last entry" if len(states) > 1 else "its only state dict"
    log.info("%s: a training list; took %s", path, which)
    return states[-1]


def _is_state_dict(item: object) -> bool:
    return isinstance(item, dict) and bool(item) and all(isinstance(value, Tensor) for value in item.values())
