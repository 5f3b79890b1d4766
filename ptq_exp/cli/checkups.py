"""The checks of `python -m ptq_exp doctor`, each a function that yields findings."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ptq_exp import __version__
from ptq_exp.cli.cache import size_text
from ptq_exp.errors import PTQError
from ptq_exp.results.environment import usable_cores

OK, WARNING, PROBLEM = LEVELS = ("ok", "warning", "problem")
_PACKAGE = Path(__file__).parents[1]
_OLDEST_PYTHON = (3, 11)
_LITTLE, _TOO_LITTLE = 5e9, 2e8
"""Bytes free: a sweep fills the first, a single run the second."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: level, what was found, and what to do (empty where all is well)."""

    level: str
    text: str
    fix: str = ""


def python() -> Iterator[Finding]:
    """Check the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        yield Finding(PROBLEM, f"Python {version}", "ptq-exp needs Python 3.11 or newer")
    else:
        yield Finding(OK, f"Python {version}, ptq-exp {__version__}")


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return what is needed, and what each optional extra needs: as setup.cfg says, or the installed package."""
    config = ConfigParser()
    if config.read(_PACKAGE.parent / "setup.cfg") and config.has_section("options"):
        extras = dict(config["options.extras_require"])
        return _parsed(config["options"]["install_requires"]), {name: _parsed(text) for name, text in extras.items()}
    found = [Requirement(text) for text in metadata.requires("ptq-exp") or ()]
    about = metadata.metadata("ptq-exp")
    names = about.get_all("Provides-Extra") or []
    extras = {
        name: [item for item in found if item.marker and item.marker.evaluate({"extra": name})] for name in names
    }
    return [item for item in found if item.marker is None], extras


def _parsed(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def _wrong(requirement: Requirement) -> str | None:
    """`name: missing` or `name 1.0, but >=2 is needed`; None where all is well. Extras of our own always are."""
    if requirement.name == "ptq-exp":
        return None
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name}: not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found}, but {requirement.specifier} is needed"
    return None


def packages() -> Iterator[Finding]:
    """Check the packages that every run needs."""
    needed, _ = requirements()
    wrong = [(item, text) for item in needed if (text := _wrong(item))]
    for item, text in wrong:
        yield Finding(PROBLEM, text, f"pip install '{item}'")
    if not wrong:
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "hydra-core", "wandb"))
        yield Finding(OK, f"{len(needed)} packages: {shown}, ...")


def extras() -> Iterator[Finding]:
    """Check packages for optional features; none is needed, so that a missing one is no fault."""
    for name, needed in requirements()[1].items():
        wrong = [text for item in needed if (text := _wrong(item))]
        if wrong:
            yield Finding(OK, f"extra {name} (optional): {', '.join(wrong)}", f"pip install 'ptq-exp[{name}]' adds it")
        else:
            yield Finding(OK, f"extra {name} (optional): installed")


def devices() -> Iterator[Finding]:
    """Check CPU cores, CUDA, MPS."""
    import torch

    yield Finding(OK, f"CPU: {usable_cores()} cores")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield Finding(OK, f"CUDA {i}: {about.name}, {size_text(about.total_memory)}, CUDA {torch.version.cuda}")
    else:
        yield Finding(OK, "CUDA: none, runs use the CPU")
    mps = getattr(torch.backends, "mps", None)
    yield Finding(OK, f"MPS: {'available' if mps is not None and mps.is_available() else 'none'}")


def disk(setting: str, folder: Path) -> Iterator[Finding]:
    """Check the space below `folder`, and whether it can be written; the nearest folder that exists stands for it."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    called = f"{setting}: {folder}"
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"ptq-exp")
    except OSError as error:
        fix = "make it writable" if setting == "runs" else "make it writable, or set cache_dir=PATH"
        yield Finding(PROBLEM, f"{called} cannot be written ({error.strerror or error})", fix)
        return
    free = shutil.disk_usage(place).free
    text = f"{called}, {size_text(free)} free"
    if free < _TOO_LITTLE:
        yield Finding(PROBLEM, text, "free some, or choose another disk: runs write images and models")
    elif free < _LITTLE:
        yield Finding(WARNING, text, "enough for small runs; `python -m ptq_exp cache prune --max-size GB` makes room")
    else:
        yield Finding(OK, text)


def weights() -> Iterator[Finding]:
    """Compare the weights inside the package with the digests on their cards."""
    import json

    from ptq_exp.storage.atomic import file_digest

    folder = _PACKAGE / "embedded" / "weights"
    cards = sorted(folder.glob("*.json"))
    wrong = []
    for card in cards:
        try:
            said = json.loads(card.read_text(encoding="utf-8"))
            files = said["files"] if "files" in said else {f"{card.stem}.safetensors": said["sha256"]}
            whole = bool(files) and all(file_digest(folder / name) == expected for name, expected in files.items())
        except (PTQError, OSError, ValueError, KeyError):
            whole = False
        if not whole:
            wrong.append(card.stem)
    strays = [path.stem for path in folder.glob("*.safetensors") if not path.with_suffix(".json").exists()]
    for name in wrong + strays:
        yield Finding(PROBLEM, f"embedded weights {name}: not the file on their card", "install ptq-exp again")
    if not cards:
        yield Finding(PROBLEM, f"embedded weights: none in {folder}", "install ptq-exp again")
    elif not wrong + strays:
        yield Finding(OK, f"embedded weights: {', '.join(card.stem for card in cards)} are whole")
