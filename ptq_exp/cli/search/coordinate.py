"""Coordinate search: one decision after the other, each with the earlier ones in force."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ptq_exp.cli.search.space import Space, Stage, merged
from ptq_exp.errors import PTQError


@dataclass(frozen=True)
class Trial:
    """A candidate of a stage, and what it measured.

    Attributes:
        stage, candidate: which; the candidate as one line.
        overrides: all settings of the trial, without its seeds.
        metrics: {name: mean over seeds}; empty where it failed.
        error: why it failed, or "".
        chosen: whether it stays.
    """

    stage: str
    candidate: str
    overrides: tuple[str, ...]
    metrics: dict[str, float]
    error: str = ""
    chosen: bool = False

    def value(self, objective: str) -> float:
        """Its objective; NaN where it failed."""
        return self.metrics.get(objective, math.nan)


@dataclass
class Search:
    """Decides the stages of `space` one after the other by what `run` measures.

    Args:
        run: overrides, with a seed -> results, as `run_trial` gives them.
        fixed: overrides of all trials that win over those of the space's base.
        jobs: trials at a time.
        on_trial: called after each trial (a progress line).
        stop: called when the search is interrupted, to end the runs that are under way.
    """

    space: Space
    run: Callable[[Sequence[str]], dict[str, Any]]
    fixed: tuple[str, ...] = ()
    jobs: int = 1
    on_trial: Callable[[Trial], object] = lambda trial: None
    stop: Callable[[], object] = lambda: None
    trials: list[Trial] = field(default_factory=list)

    def best(self) -> tuple[str, ...]:
        """Decide all stages.

        Returns:
            The overrides that were decided, without `fixed` and the space's base.

        Raises:
            PTQError: no candidate of a stage gave a number; the message has the first one's reason.
        """
        decided: tuple[str, ...] = ()
        for stage in self.space.stages:
            decided = self._decide(stage, decided)
        return decided

    def _decide(self, stage: Stage, decided: tuple[str, ...]) -> tuple[str, ...]:
        """`decided` with the best candidate of `stage`."""
        options = [merged(decided, candidate) for candidate in stage.candidates]
        found = self._measured(stage, options)
        best = None
        for n, trial in enumerate(found):
            value = trial.value(self.space.objective)
            if not math.isnan(value) and (best is None or self.space.better(value, self._value(found[best]))):
                best = n
        if best is None:
            raise PTQError(f"stage {stage.name} of the search: no candidate gave {self.space.objective}: "
                           f"{found[0].error or 'results.json has no such metric'}")  # fmt: skip
        self.trials += [Trial(**{**vars(trial), "chosen": n == best}) for n, trial in enumerate(found)]
        return options[best]

    def _value(self, trial: Trial) -> float:
        return trial.value(self.space.objective)

    def _measured(self, stage: Stage, options: list[tuple[str, ...]]) -> list[Trial]:
        """A trial for each option, all its seeds; `jobs` runs at a time."""
        settings = [merged(self.space.base, self.fixed, option) for option in options]
        runs = {(n, seed): (*one, f"seed={seed}") for n, one in enumerate(settings) for seed in self.space.seeds}
        by_settings: dict[tuple[str, ...], Any] = {}
        with ThreadPoolExecutor(self.jobs) as pool, self._stopped_with(pool):
            for one in runs.values():
                if one not in by_settings:
                    by_settings[one] = pool.submit(self.run, one)
            trials = []
            for n, candidate in enumerate(stage.candidates):
                results = [by_settings[runs[n, seed]].result() for seed in self.space.seeds]
                line = " ".join(candidate) or "(nothing)"
                trials.append(Trial(stage.name, line, settings[n], *_mean(results)))
                self.on_trial(trials[-1])
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
    """Mean of each metric over the seeds and "", or {} and why one failed."""
    failed = [result["error"] for result in results if "metrics" not in result]
    if failed:
        return {}, failed[0]
    names = [name for name in results[0]["metrics"] if all(name in result["metrics"] for result in results)]
    return {name: fmean(result["metrics"][name] for result in results) for name in names}, ""
