"""What a coordinate search tries: its file of stages and candidates, and a trial of one of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ptq_exp.cli.search_conditions import conditions
from ptq_exp.cli.search_pairs import Images
from ptq_exp.errors import ConfigError, one_line
from ptq_exp.evaluation.bootstrap import Interval

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Stage:
    """One decision: each candidate is a line of Hydra overrides, the first one what stands without a decision."""

    name: str
    candidates: Sequence[str]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(f"stage {self.name} has no candidates")
        for line in self.candidates:
            _overrides(shlex.split(line))


@dataclass
class Trial:
    """A candidate of a stage, and what it measured.

    Attributes:
        stage, candidate: which; the candidate as one line.
        overrides: all settings of the trial, without its seeds.
        metrics: {name: mean over seeds}; empty where a run failed.
        error: why it failed or cannot win, or "".
        chosen: whether it stays.
        gain: 95 % interval of how much better it is than the best of its stage before it; None where the objective is
            none of single images, or there was none before it.
        images: the objective of every image, where it is a mean of these.
    """

    stage: str
    candidate: str
    overrides: tuple[str, ...]
    metrics: dict[str, float]
    error: str = ""
    chosen: bool = False
    gain: Interval | None = None
    images: Images | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON, without its images."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "images"}


@dataclass(frozen=True)
class Space:
    """What a search tries.

    Attributes:
        objective: name of a score in results.json.
        direction: one of `DIRECTIONS`.
        seeds: of each trial; the objective is their mean.
        base: overrides of all trials.
        stages: decided one after the other, each with the earlier decisions in force.
        require: {path in results.json, such as runtime.int8_share: least value}; may be left out. A trial with less,
            for any seed, cannot win. A number that is null (of what the network does not have) meets any condition.
        tolerance: by how much more than this a later candidate of a stage must be better to replace an earlier one; 0
            if left out. Where the objective is a mean over images, as PSNR is, the 95 % interval of the gain, by a
            paired bootstrap over them, must lie above 0 as well.
    """

    objective: str
    direction: str
    seeds: Sequence[int]
    base: Sequence[str]
    stages: Sequence[Stage]
    require: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction}: choose one of {', '.join(DIRECTIONS)}")
        if not self.seeds or not self.stages:
            raise ValueError("seeds and stages need an entry each")

    @classmethod
    def load(cls, path: Path) -> Space:
        """Read a YAML file such as conf/search/best.yaml.

        Raises:
            ConfigError: the file is missing, or a setting is unknown, missing or of the wrong kind.
        """
        try:
            plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is no readable YAML file: {one_line(error)}") from error
        try:
            values = _section(cls, plain)
            return cls(
                str(values["objective"]), str(values["direction"]),
                [int(seed) for seed in values["seeds"]], _overrides(values["base"]),
                [Stage(**_section(Stage, stage)) for stage in values["stages"]], conditions(values.get("require", {})),
                float(values.get("tolerance", 0)),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def until(self, stage: str) -> Space:
        """Return the same search, ending with the decision of `stage`.

        Raises:
            ConfigError: there is no such stage.
        """
        names = [one.name for one in self.stages]
        if stage not in names:
            raise ConfigError(f"no stage {stage} in the search: choose one of {', '.join(names)}")
        return replace(self, stages=self.stages[: names.index(stage) + 1])

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1

    def better(self, trial: Trial, than: Trial) -> bool:
        """Return whether a later trial is better `than` an earlier one; the interval of the gain is noted in it."""
        gain = self.sign * (trial.metrics[self.objective] - than.metrics[self.objective])
        if trial.images is not None and than.images is not None:
            trial.gain = trial.images.gain(than.images, self.sign)
        return gain > self.tolerance and (trial.gain is None or trial.gain[0] > 0)


def _section(kind: type, found: Any) -> dict[str, Any]:
    """Return `found` if it has the fields of the dataclass `kind`, and no others."""
    names = [one.name for one in fields(kind)]
    optional = {one.name for one in fields(kind) if (one.default, one.default_factory) != (MISSING, MISSING)}
    if isinstance(found, dict) and set(names) - optional <= set(found) <= set(names):
        return found
    shown = ", ".join(map(str, found)) if isinstance(found, dict) else found
    raise ValueError(f"expected the settings {', '.join(names)}, found {shown}")


def _overrides(found: Any) -> list[str]:
    if not isinstance(found, list) or any(not isinstance(one, str) or "=" not in one for one in found):
        raise ValueError(f"expected overrides such as bits=w4a8, found {found}")
    return found
