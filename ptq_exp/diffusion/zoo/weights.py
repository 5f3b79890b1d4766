"""The weights in a folder of a network: one file or shards, in full precision or as a variant such as fp16."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from ptq_exp.diffusion.checkpoints import read_checkpoint
from ptq_exp.diffusion.zoo.settings import read_json
from ptq_exp.errors import CheckpointError

STEM = "diffusion_pytorch_model"
# the name of a variant stands behind the stem, or, in older folders, behind the number of the shard or `.index`
_NAME = re.compile(
    rf"{STEM}(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<behind>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<last>\w+))?\.json)?"
)
_PREFERRED = ("safetensors", "bin")


class Weights(NamedTuple):
    """Which of the files are loaded: `variant` as `from_pretrained` takes it, and whether they are safetensors."""

    variant: str | None
    safe: bool
    files: tuple[Path, ...]


def find_weights(folder: Path) -> Weights:
    """Return the weights to load from `folder`: the plain ones before a variant, safetensors before pickled tensors.

    A variant is taken where nothing else is there; whoever loads it says so, and in which type.

    Raises:
        CheckpointError: no weights, several variants and no plain weights, or shards that are not complete.
    """
    found: dict[tuple[str | None, str], list[re.Match]] = {}
    for path in sorted(folder.iterdir()):
        if (match := _NAME.fullmatch(path.name)) is not None:
            variant = match["variant"] or match["behind"] or match["last"]
            found.setdefault((variant, match["kind"]), []).append(match)
    variants = sorted({variant for variant, _ in found if variant is not None})
    plain = any(variant is None for variant, _ in found)
    if not found:
        raise _error(folder, f"no {STEM}.safetensors or {STEM}.bin in it; there is {listing(folder)}")
    if not plain and len(variants) > 1:
        raise _error(folder, f"holds the variants {', '.join(variants)} of its weights and no {STEM}.safetensors; "
                             "leave the files of one variant there")
    variant = None if plain else variants[0]
    kind = next(kind for kind in _PREFERRED if (variant, kind) in found)
    return Weights(variant, kind == "safetensors", _files(folder, found[variant, kind]))


def _files(folder: Path, matches: Iterable[re.Match]) -> tuple[Path, ...]:
    """One file, or the shards that an index names; an index goes first, as in diffusers."""
    indices = [folder / match.string for match in matches if match["index"]]
    if indices:
        return _shards(indices[0])
    whole = [folder / match.string for match in matches if not match["shard"]]
    if not whole:
        kind = next(iter(matches))["kind"]
        raise _error(folder, f"holds shards of its weights, but not the {STEM}.{kind}.index.json that lists them")
    return (whole[0],)


def _shards(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise _error(index.parent, f"{index.name}: weight_map does not map the name of each tensor to a file")
    files = tuple(index.parent / name for name in sorted(set(places.values())))
    missing = [path.name for path in files if path.parent != index.parent or not path.is_file()]
    if missing:
        raise _error(index.parent, f"{index.name} names {', '.join(missing[:3])}: no such file here")
    for path in files:
        _check_shard(path, {name for name, file in places.items() if file == path.name})
    return files


def _check_shard(path: Path, expected: set[str]) -> None:
    """CheckpointError unless a shard holds the tensors that the index puts there: diffusers believes the index."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as stream:
                found = set(stream.keys())
        else:
            found = set(read_checkpoint(path))
    except Exception as error:  # whatever damaged bytes make the library stumble over
        raise _error(path.parent, damage([path]) or f"{path.name} is not readable ({error})") from error
    for what, names in ("lacks", expected - found), ("also holds", found - expected):
        if names:
            found = f"{path.name} {what} {len(names)} tensors ({', '.join(sorted(names)[:3])})"
            raise _error(path.parent, f"{found}: it is not the shard that its index lists")


def damage(files: Iterable[Path]) -> str | None:
    """Return what is wrong with the first file that cannot be read safely, with its name; None = all can be read."""
    for path in files:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            return f"{path.name}: {str(error).removeprefix(f'model.checkpoint={path}: ')}"
    return None


def listing(folder: Path, limit: int = 6) -> str:
    """Return the first names in a folder, for messages."""
    names = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit) if names else "nothing"


def _error(folder: Path, text: str) -> CheckpointError:
    return CheckpointError(f"model.checkpoint={folder}: {text}")
