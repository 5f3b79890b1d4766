"""Where a diffusers folder lies: a path, or a repository in the hub's cache."""

from __future__ import annotations

import logging
import tarfile
import zipfile
from pathlib import Path

from ptq_exp.diffusion.zoo.weights import STEM, listing
from ptq_exp.errors import CheckpointError

log = logging.getLogger(__name__)
INDEX = "model_index.json"
_SETTINGS = ("config.json", "scheduler_config.json", "*/config.json", "*/scheduler_config.json", INDEX)
_NETWORKS = ("unet", "transformer")


def local_folder(checkpoint: str) -> Path:
    """Return the folder `checkpoint`, or the local copy of a repository of that id, downloaded if need be.

    The network of a pipeline stands for the pipeline around it, which knows its scheduler and first stage; a folder of
    the hub's cache (models--owner--name) for the snapshot in it. Only settings and weights are fetched: safetensors,
    and pickled tensors or variants where a repository has nothing else.

    Raises:
        CheckpointError: no such folder, one that holds no model, and no such repository can be reached.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return _model_folder(path)
    if path.exists():
        raise CheckpointError(
            f"model.checkpoint={checkpoint}: a file; the model `diffusers` takes a folder{_instead(path)}"
        )
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(f"model.checkpoint={checkpoint}: no such folder, and not a repository id (owner/name)")
    try:
        return _snapshot(checkpoint)
    except Exception as error:  # the hub client raises many unrelated kinds: network, cache, permissions, HTTP
        raise CheckpointError(
            f"model.checkpoint={checkpoint}: no such folder, and a repository of that id is neither in the local cache "
            f"nor reachable ({type(error).__name__}); download it and give its folder"
        ) from error


def is_local(checkpoint: str) -> bool:
    """Whether `checkpoint` is an existing file or folder, or a repository id in the local cache; asks no network."""
    if Path(checkpoint).exists():
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(checkpoint, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return False
    return True


def _model_folder(path: Path) -> Path:
    """Return the folder that holds the model of the existing folder `path`; see `local_folder`."""
    if (path / INDEX).exists():
        return path
    if (path / "config.json").exists():
        around = path.resolve().parent
        if path.resolve().name in _NETWORKS and (around / INDEX).exists():
            log.warning("%s: a part of the pipeline %s, which is taken with its scheduler", path, around)
            return around
        return path
    if (path / "snapshots").is_dir():
        return _of_cache(path)
    inner = sorted(p.name for p in path.iterdir() if (p / INDEX).exists() or (p / "config.json").exists())
    hint = f"; give {' or '.join(str(path / name) for name in inner[:3])}" if inner else ""
    raise CheckpointError(f"model.checkpoint={path}: not a diffusers folder: no config.json or {INDEX} in it, "
                          f"but {listing(path)}{hint}")


def _of_cache(path: Path) -> Path:
    """Return the snapshot of a repository's folder in the cache: that of its main branch, or the only one."""
    snapshots = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
    main = path / "refs" / "main"
    named = path / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
    chosen = named if named in snapshots else snapshots[0] if len(snapshots) == 1 else None
    if chosen is None:
        raise CheckpointError(f"model.checkpoint={path}: the cache of a repository with {len(snapshots)} snapshots; "
                              "give the folder of one: snapshots/REVISION")
    log.info("%s: the cache of a repository; took %s", path, chosen)
    return _model_folder(chosen)


def _instead(path: Path) -> str:
    """Return what to give in place of a file."""
    if (zipfile.is_zipfile(path) and not _is_torch(path)) or tarfile.is_tarfile(path):
        return ": this is an archive; unpack it and give the folder that was in it"
    folder = path.parent
    if folder.name in _NETWORKS and (folder.parent / INDEX).exists():
        folder = folder.parent
    if (folder / INDEX).exists() or (folder / "config.json").exists():
        return f"; give {folder}"
    return "; weights alone say neither their network nor its noise schedule: give the folder with its config.json"


def _is_torch(path: Path) -> bool:
    """Whether a zip file is what torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") or name == "data.pkl" for name in archive.namelist())


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    variants = ["*.fp16.*", "*.fp16-*", "*non_ema*"]
    for ending, ignored in (("safetensors*", variants), ("bin", variants), ("safetensors*", ["*non_ema*"])):
        patterns = [*_SETTINGS, *(f"{place}{STEM}*.{ending}" for place in ("", "*/"))]
        path = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ignored))
        if any(path.rglob(f"{STEM}*.{ending.rstrip('*')}")):
            break
    return path
