"""Search settings coordinate by coordinate: one decision after the other, each with the earlier ones in force."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ptq_exp.cli.search_conditions import check_known, missed
from ptq_exp.cli.search_pairs import images_of
from ptq_exp.cli.search_space import Space, Stage, Trial
from ptq_exp.errors import PTQError


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
