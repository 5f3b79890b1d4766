"""What weights of a folder take of the memory that `trainer.max_memory_gb` allows: what cannot stay in its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ptq_exp.diffusion.checkpoints import is_mapped, read_checkpoint
from ptq_exp.diffusion.zoo.build import DTYPES, MAPPED, require_range
from ptq_exp.errors import ConfigError


def require_room(
    folder: Path, files: Sequence[Path], kind: torch.dtype, setting: str | None = None
) -> Counter[torch.dtype]:
    """Count the real numbers of each type in `files`, the weights in `folder`.

    Args:
        kind: the type that they are wanted in.
        setting: that chooses it; None = nobody can choose it.

    Raises:
        ConfigError: inside `mapped_weights`, those that are of another type or cannot be mapped would take more memory
            than is allowed.
    """
    if (most := MAPPED.get()) is None:
        return Counter()
    whole = [path for path in files if not is_mapped(path)]
    if (size := sum(path.stat().st_size for path in whole)) > most:
        raise ConfigError(
            f"model.checkpoint={folder}: {whole[0].name} is a pickle of torch before 1.6, which is read whole: "
            f"{size / 1e9:.3g} GB are more than trainer.max_memory_gb={most / 1e9:g}: save the weights as safetensors "
            "(save_pretrained(folder, safe_serialization=True))"
        )
    stored = _stored(files)
    size = kind.itemsize * sum(count for other, count in stored.items() if other != kind)
    if size > most:
        usual = stored.most_common(1)[0][0]
        other_type = setting is not None and usual != kind and usual in DTYPES.values()
        raise ConfigError(
            f"{f'{setting}={short(kind)}' if setting else f'model.checkpoint={folder}'}: the weights in {folder} are "
            f"{', '.join(map(short, stored))}, and converted they would take {size / 1e9:.3g} GB, more than "
            f"trainer.max_memory_gb={most / 1e9:g}: set "
            + (f"{setting}={short(usual)}" if other_type else "it to more than that")
        )
    return stored


def mapped_type(
    folder: Path, files: Sequence[Path], dtype: torch.dtype, wanted: torch.dtype | None
) -> torch.dtype:
    """Return the type to load weights in, `dtype` unless more of them can stay in `files` in another one.

    Args:
        wanted: see `load_component`.

    Raises:
        ConfigError: see `require_room`; or numbers are too large for their type.
    """
    kind = wanted or dtype
    stored = require_room(folder, files, kind, "model.dtype" if wanted else None)
    if kind not in stored or (torch.float64 in stored and kind != torch.float64):
        return dtype  # numbers of float64 are rounded once more on their way by `dtype`
    for path in files:
        wider = {name: value for name, value in read_checkpoint(path).items() if value.dtype != kind}
        require_range(wider.items(), kind, path)
    return kind


def short(kind: torch.dtype) -> str:
    """Return the name of a type, such as float32."""
    return str(kind).removeprefix("torch.")


def _stored(files: Sequence[Path]) -> Counter[torch.dtype]:
    found = Counter[torch.dtype]()
    for path in files:
        for value in read_checkpoint(path).values():
            found[value.dtype] += value.numel() if value.is_floating_point() else 0
    return +found
