"""Search settings coordinate by coordinate: one decision after the other, each with the earlier ones in force."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ptq_exp.cli.search_conditions import check_known, conditions, missed
from ptq_exp.cli.search_pairs import Images, images_of
from ptq_exp.errors import ConfigError, PTQError, one_line
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


def merged(*overrides: Iterable[str]) -> tuple[str, ...]:
    """Join `overrides` one after the other; of those for the same key only the last stays, in its place.

    A group that is chosen anew (`reconstruction=qdrop`) takes the settings inside it (`reconstruction.lr=0.1`) along.
    """
    kept: dict[str, str] = {}
    for override in (one for several in overrides for one in several):
        key = override.partition("=")[0]
        kept = {k: v for k, v in kept.items() if k != key and not k.startswith(f"{key}.")}
        kept[key] = override
    return tuple(kept.values())


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


@dataclass
class Search:
    """Decides the stages of `space` one after the other by what `run` measures.

    Args:
        run: overrides, with a seed -> results.json, or {"error": text}.
        fixed: overrides of all trials that win over those of the space's base.
        jobs: trials at a time.
        on_trial: called after each trial (a progress line).
        stop: called when the search is interrupted, to end the runs that are under way.
    """

    space: Space
    run: Callable[[Sequence[str]], dict[str, Any]]
    fixed: Sequence[str] = ()
    jobs: int = 1
    on_trial: Callable[[Trial], object] = lambda trial: None
    stop: Callable[[], object] = lambda: None
    trials: list[Trial] = field(default_factory=list)

    def best(self) -> tuple[str, ...]:
        """Decide all stages.

        Returns:
            The overrides that were decided, without `fixed` and the space's base.

        Raises:
            PTQError: no candidate of a stage gave a number and met the conditions; with the first one's reason.
            ConfigError: a condition is on what results.json of no trial has.
        """
        decided: tuple[str, ...] = ()
        for stage in self.space.stages:
            decided = self._decide(stage, decided)
        return decided

    def _decide(self, stage: Stage, decided: tuple[str, ...]) -> tuple[str, ...]:
        """Return `decided` with the best candidate of `stage`."""
        objective = self.space.objective
        options = [merged(decided, shlex.split(line)) for line in stage.candidates]
        trials = self._measured(stage, options)
        best = None
        for n, trial in enumerate(trials):
            value = math.nan if trial.error else trial.metrics.get(objective, math.nan)
            if not math.isnan(value) and (best is None or self.space.better(trial, trials[best])):
                best = n
        if best is None:
            reason = trials[0].error or "results.json has no such score"
            raise PTQError(f"stage {stage.name} of the search: no candidate gave {objective}: {reason}")
        trials[best].chosen = True
        return options[best]

    def _measured(self, stage: Stage, options: list[tuple[str, ...]]) -> list[Trial]:
        """Return a trial for each option, all its seeds; `jobs` runs at a time, equal ones once."""
        settings = [merged(self.space.base, self.fixed, option) for option in options]
        runs = {one: [(*one, f"seed={seed}") for seed in self.space.seeds] for one in settings}
        trials = []
        with ThreadPoolExecutor(self.jobs) as pool, self._stopped_with(pool):
            futures = {run: pool.submit(self.run, run) for seeds in runs.values() for run in seeds}
            for one, line in zip(settings, stage.candidates, strict=True):
                results = [futures[run].result() for run in runs[one]]
                metrics, error = _mean(results)
                error = error or missed(self.space.require, results)
                images = images_of(self.space.objective, results)
                trial = Trial(stage.name, line or "(nothing)", one, metrics, error, images=images)
                trials.append(trial)
                self.trials.append(trial)
                self.on_trial(trial)
            finished = [result for run in futures.values() if "metrics" in (result := run.result())]
        check_known(self.space.require, finished)
        return trials

    @contextmanager
    def _stopped_with(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """End what runs and start nothing more where the block does not end well: the pool would wait for all of it."""
        try:
            yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise


def _mean(results: list[dict[str, Any]]) -> tuple[dict[str, float], str]:
    """Average each score over the seeds, and give ""; or {} and why one failed."""
    failed = [result["error"] for result in results if "metrics" not in result]
    if failed:
        return {}, failed[0]
    names = [name for name in results[0]["metrics"] if all(name in result["metrics"] for result in results)]
    return {name: fmean(result["metrics"][name] for result in results) for name in names}, ""
