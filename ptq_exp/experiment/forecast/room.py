"""Memory and disk: what a run takes, what there is, and which setting makes it fit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptq_exp.errors import ConfigError

UNSURE = 1.25
"""A run is refused where even this much less would be too much."""


@dataclass(frozen=True)
class Need:
    """Bytes that are needed, and the setting that they grow with.

    Attributes:
        fixed: bytes whatever the setting.
        each: bytes of each unit of `setting`.
        setting, value: its name and what it is now.
    """

    fixed: float
    each: float
    setting: str
    value: int | str

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.fixed + (self.each * int(self.value) if self.each else 0.0)

    def fitting(self, room: float) -> int:
        """Return the largest value of the setting that fits; 0 where none does."""
        return int((room - self.fixed) // self.each) if self.each else 0


def free_disk(path: Path) -> float:
    """Return the free bytes of the disk that `path`, which need not exist, would lie on."""
    return float(shutil.disk_usage(_existing(path)).free)


def disk_of(path: Path) -> int:
    """Return the number of the file system that `path`, which need not exist, would lie on."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_memory(needs: Mapping[str, Need], room: float | None, where: str) -> None:
    """Raise ConfigError for the stage that takes most, if it cannot fit into `room` bytes beyond what is in use.

    Args:
        where: what the room is, for the message.
    """
    if room is None or not needs:
        return
    stage, need = max(needs.items(), key=lambda item: item[1].bytes)
    if need.bytes <= UNSURE * room:
        return
    fits = need.fitting(room)
    fix = f"set {need.setting}={fits}" if need.each and 1 <= fits < int(need.value) else (
        "set trainer.max_memory_gb to quantize block by block, or choose a smaller model"
    )
    raise ConfigError(
        f"{need.setting}={need.value}: {stage} would take {need.bytes / 1e9:.2f} GB, {where} {room / 1e9:.2f} GB: {fix}"
    )


def check_disk(needs: Mapping[str, tuple[Path, float]], settings: Mapping[str, str]) -> None:
    """Raise ConfigError for a disk that has no room for what is written to it.

    Args:
        needs: what -> where it is written, and its bytes.
        settings: what -> the setting that says where, with a way to need less.
    """
    by_disk: dict[int, list[str]] = {}
    for what, (path, _) in needs.items():
        by_disk.setdefault(disk_of(path), []).append(what)
    for names in by_disk.values():
        need, free = sum(needs[what][1] for what in names), free_disk(needs[names[0]][0])
        if need > free:
            largest = max(names, key=lambda what: needs[what][1])
            raise ConfigError(
                f"{needs[largest][0]}: the run would write {need / 1e9:.3g} GB ({', '.join(names)}), the disk has "
                f"{free / 1e9:.3g} GB free: {settings[largest]}"
            )
