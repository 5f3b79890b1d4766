"""`Walk`: what answers the calls of a pipeline's network, step by step of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptq_exp.diffusion import Call, StepRecord, TimeGrid
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines.probe import Stopped


class Walk:
    """Answers the calls of a component, and shows `on_step` the first evaluation at each time of the grid.

    An evaluation is one call, or `calls` calls of the same states and time, one with each condition (true guidance of
    FLUX); their rows are shown behind each other.

    Args:
        denoiser: answers.
        steps: end after so many of the grid's steps, by `Stopped`.
        on_step: None = nothing is shown.
        calls: of each evaluation.
    """

    def __init__(
        self, denoiser: nn.Module, grid: TimeGrid, steps: int, on_step: Callable[[StepRecord], None] | None,
        calls: int = 1,
    ) -> None:
        self.denoiser, self.grid, self.steps, self.on_step, self.calls = denoiser, grid, steps, on_step, calls
        self._seen: set[int] = set()
        self._pending: list[tuple[Call, Tensor]] = []

    def __call__(self, call: Call) -> Tensor:
        """Return the estimates of `call`.

        Raises:
            ConfigError: a time outside of the grid, or fewer calls at a time than `calls`.
        """
        estimate = call.evaluate(self.denoiser)
        if self.on_step is None and self.steps >= len(self.grid):
            return estimate
        step = int(self.grid.step_of(call.t[:1]))
        if step not in self._seen:
            self._add(step, call, estimate)
        if len(self._seen) >= self.steps < len(self.grid):
            raise Stopped
        return estimate

    def _add(self, step: int, call: Call, estimate: Tensor) -> None:
        if self._pending and not torch.equal(self._pending[0][0].t[:1], call.t[:1]):
            time = float(self._pending[0][0].t[0])
            raise ConfigError(
                f"the pipeline calls its network {self.calls} times in the first step, but {len(self._pending)} times "
                f"at time {time:g}: choose settings of its call that guide every step, or none"
            )
        self._pending.append((call, estimate))
        if len(self._pending) == self.calls:
            calls, estimates = zip(*self._pending, strict=True)
            self._pending = []
            self._seen.add(step)
            if self.on_step is not None:
                self.on_step(StepRecord(step, joined(calls), torch.cat(estimates)))


def joined(calls: Sequence[Call]) -> Call:
    """Return one call with the rows of all, those of the first call in front."""
    if len(calls) == 1:
        return calls[0]
    conditions = {name: torch.cat([call.conditions[name] for call in calls]) for name in calls[0].conditions}
    return Call(torch.cat([call.x for call in calls]), torch.cat([call.t for call in calls]), conditions)
