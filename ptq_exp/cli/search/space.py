"""`Space`: the stages of a search and their candidates, read from a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ptq_exp.errors import ConfigError

DIRECTIONS = ("maximize", "minimize")


def merged(*overrides: Iterable[str]) -> tuple[str, ...]:
    """All `overrides` one after the other; of those for the same key only the last stays, in its place.

    A group that is chosen anew (`reconstruction=qdrop`) takes the settings inside it (`reconstruction.lr=0.1`) along.
    """
    kept: dict[str, str] = {}
    for override in (one for several in overrides for one in several):
        key = override.partition("=")[0]
        kept = {k: v for k, v in kept.items() if k != key and not k.startswith(f"{key}.")}
        kept[key] = override
    return tuple(kept.values())


@dataclass(frozen=True)
class Stage:
    """One decision: `candidates` are tuples of Hydra overrides, the first of them what stands without a decision."""

    name: str
    candidates: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Space:
    """What a search tries.

    Attributes:
        objective: name of a metric in results.json.
        direction: one of `DIRECTIONS`.
        tolerance: how much better a later candidate of a stage must be to replace an earlier one.
        seeds: of each trial; the objective is their mean.
        base: overrides of all trials.
        stages: decided one after the other, each with the earlier decisions in force.
    """

    objective: str
    direction: str
    tolerance: float
    seeds: tuple[int, ...]
    base: tuple[str, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, path: Path) -> Space:
        """Read a YAML file such as conf/search/best.yaml.

        Raises:
            ConfigError: the file is missing, or a setting is unknown, missing or of the wrong kind.
        """
        try:
            plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is no readable YAML file: {' '.join(str(error).split())}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(plain, dict) or set(plain) != set(names):
            found = ", ".join(map(str, plain)) if isinstance(plain, dict) else type(plain).__name__
            raise ConfigError(f"{path}: expected the settings {', '.join(names)}, found {found}")
        if plain["direction"] not in DIRECTIONS:
            raise ConfigError(f"{path}: direction={plain['direction']}: choose one of {', '.join(DIRECTIONS)}")
        try:
            return cls(
                str(plain["objective"]), plain["direction"], float(plain["tolerance"]),
                tuple(int(seed) for seed in plain["seeds"]), _overrides(plain["base"]),
                tuple(_stage(stage) for stage in plain["stages"]),
            )._checked()  # fmt: skip
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def until(self, stage: str) -> Space:
        """The same search that ends with the decision of `stage`.

        Raises:
            ConfigError: there is no such stage.
        """
        names = [one.name for one in self.stages]
        if stage not in names:
            raise ConfigError(f"no stage {stage} in the search: choose one of {', '.join(names)}")
        return replace(self, stages=self.stages[: names.index(stage) + 1])

    def better(self, value: float, than: float) -> bool:
        """Whether `value` of the objective is better `than` another one by more than the tolerance."""
        gain = value - than if self.direction == "maximize" else than - value
        return gain > self.tolerance

    def _checked(self) -> Space:
        if not self.seeds or not self.stages:
            raise ValueError("seeds and stages need an entry each")
        if empty := [stage.name for stage in self.stages if not stage.candidates]:
            raise ValueError(f"stage {empty[0]} has no candidates")
        return self


def _stage(plain: Any) -> Stage:
    if not isinstance(plain, dict) or set(plain) != {"name", "candidates"}:
        raise ValueError(f"a stage needs name and candidates, found {plain}")
    return Stage(str(plain["name"]), tuple(_overrides(shlex.split(line)) for line in plain["candidates"]))


def _overrides(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or any(not isinstance(one, str) or "=" not in one for one in found):
        raise ValueError(f"expected overrides such as bits=w4a8, found {found}")
    return tuple(found)
