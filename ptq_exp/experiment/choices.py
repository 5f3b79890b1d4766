"""What bits=auto chooses from: groups of layers, what each candidate costs them, and the budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from ptq_exp.errors import ConfigError, InfeasibleError
from ptq_exp.experiment.budget import planned_report
from ptq_exp.experiment.latency import latency_table
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.policy import ends
from ptq_exp.experiment.run import Run
from ptq_exp.pipelines import RecordedModel
from ptq_exp.quantization import Allocation, Budget, Report, Row, sharing
from ptq_exp.settings.schema import ExperimentConfig, ReconstructionConfig

MEGABYTE = 1e6


@dataclass(frozen=True)
class Limit:
    """A budget as the settings have it.

    Attributes:
        name: of the setting, behind `bits.budget.`.
        value: of the setting.
        cost: [G, C], in the unit of what is added up: bytes, bit operations, milliseconds.
        fixed: cost of all that is not chosen.
        upper: most that the whole network may cost.
        shown: a cost in the unit of the setting.
        at_most: whether the setting is the largest value that is allowed, not the least.
    """

    name: str
    value: float
    cost: np.ndarray
    fixed: float
    upper: float
    shown: Callable[[float], float] = float
    at_most: bool = True

    @property
    def budget(self) -> Budget:
        """What is left for the groups that are chosen."""
        return Budget(self.cost, self.upper - self.fixed)

    def of(self, choice: Sequence[int]) -> float:
        """Return what a choice makes of the whole network, in the unit of the setting."""
        return self.shown(self.fixed + self.budget.total(choice))


@dataclass(frozen=True)
class Choices:
    """Groups of layers that get a candidate each, and the budgets.

    Attributes:
        groups: layers of each group.
        candidates: widths such as w4a8.
        limits: the budgets.
    """

    groups: tuple[tuple[str, ...], ...]
    candidates: tuple[str, ...]
    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, run: Run, config: ExperimentConfig) -> Choices | None:
        """Find them for the model of a run; None where no budget is set.

        Raises:
            ConfigError: nothing can be chosen.
            InfeasibleError: no choice is within the budgets; the message says what could be reached.
        """
        limits, candidates = config.bits.limits, tuple(config.bits.candidates or ())
        if not limits:
            return None
        if isinstance(run.model, RecordedModel):
            raise ConfigError("bits=auto measures trajectories, and a network alone has no sampler: give widths by "
                              "bits.groups")
        plan = Plan.of(at_widths(config, {}), run.grid)
        layers = _free_layers(run, plan)
        network = run.model.denoiser.to(run.device)
        groups = tuple(sharing(network, run.example(), layers))

        def at(number: int) -> ExperimentConfig:
            return with_candidates(config, groups, candidates, [number] * len(groups))

        reports = [planned_report(run, Plan.of(at(number), run.grid), ReconstructionConfig())
                   for number in range(len(candidates))]
        counted = [_limit(name, value, groups, reports) for name, value in limits.items() if name in _COUNTED]
        if "latency_ms" in limits:
            cls(groups, candidates, tuple(counted)).check()  # before anything is timed
            cost, fixed = latency_table(run, at, len(candidates), groups)
            counted.append(Limit("latency_ms", limits["latency_ms"], cost, fixed, limits["latency_ms"]))
        choices = cls(groups, candidates, tuple(counted))
        choices.check()
        return choices

    def allocation(self, score: np.ndarray) -> Allocation:
        """Return the problem of the least `score` [G, C] within the budgets."""
        return Allocation(score, [limit.budget for limit in self.limits])

    def check(self) -> None:
        """Raise InfeasibleError where no choice is within the budgets."""
        problem = self.allocation(np.zeros((len(self.groups), len(self.candidates))))
        try:
            problem.best()
        except InfeasibleError:
            raise InfeasibleError(self._refusal(problem)) from None

    def layers(self, choice: Sequence[int]) -> dict[str, str]:
        """Map each layer to its candidate."""
        return {name: self.candidates[c] for group, c in zip(self.groups, choice, strict=True) for name in group}

    def uniform(self) -> list[tuple[int, ...]]:
        """Return the choices of one candidate for all groups that are within the budgets."""
        same = [(number,) * len(self.groups) for number in range(len(self.candidates))]
        return [choice for choice in same if all(limit.budget.holds(choice) for limit in self.limits)]

    def _refusal(self, problem: Allocation) -> str:
        for number, limit in enumerate(self.limits):
            alone = Allocation(problem.score, [problem.budgets[number]])
            others = "" if len(self.limits) == 1 else " with the other budgets"
            for found, under in ((alone.least(0), ""), (problem.least(number), others)):
                if found is not None and found > limit.budget.upper:
                    reached = limit.shown(found + limit.fixed)
                    most = "smallest" if limit.at_most else "largest"
                    return (f"bits.budget.{limit.name}={limit.value:g} is not met: the {most} that bits.candidates="
                            f"[{','.join(self.candidates)}] reach{under} is {reached:.6g}")
        return "no choice of bits.candidates is within all of bits.budget: set one of them to null, or add candidates"


def at_widths(config: ExperimentConfig, layers: Mapping[str, str]) -> ExperimentConfig:
    """Return the settings with widths for single layers, and nothing left to choose."""
    groups = {_glob(name): widths for name, widths in layers.items()} | config.bits.groups
    return replace(config, bits=replace(config.bits, groups=groups, budget={}, candidates=None))


def with_candidates(
    config: ExperimentConfig, groups: Sequence[Sequence[str]], candidates: Sequence[str], choice: Sequence[int]
) -> ExperimentConfig:
    """Return the settings with the candidate of each group."""
    chosen = zip(groups, choice, strict=True)
    return at_widths(config, {name: candidates[number] for group, number in chosen for name in group})


def _glob(name: str) -> str:
    """Return a name as a key of bits.groups: globs differ from named groups by their dots and brackets."""
    return name if "." in name else f"[{name[:1]}]{name[1:]}"


def _free_layers(run: Run, plan: Plan) -> list[str]:
    """Return the quantized layers between the first and the last ones that no setting gives widths of their own."""
    first, last = ends(plan, run.model)
    taken = [*first, *last, *(pattern for pattern, _, _ in plan.groups.values())]
    rows = planned_report(run, plan, ReconstructionConfig()).rows
    free = [row.name for row in rows if row.scope == "conv_linear" and row.weight_bits is not None
            and not any(fnmatchcase(row.name, pattern) for pattern in taken)]
    if not free:
        raise ConfigError("bits.budget: there is no layer to choose widths for: bits.groups, quantization.keep_fp and "
                          "the first and last layers take all")
    return free


def _bops_of(row: Row) -> float:
    return float(row.bops) if row.scope == "conv_linear" else 0.0


_COUNTED: dict[str, tuple[Callable[[Row], float], Callable[[Report], float]]] = {
    "size_mb": (lambda row: row.weight_bytes, lambda report: report.totals["weight_bytes"]),
    "bops_ratio": (_bops_of, lambda report: report.totals["bops"]["conv_linear"]),
}
"""Of each budget that the report counts: the cost of a row, and that of the whole network."""


def _limit(name: str, value: float, groups: Sequence[Sequence[str]], reports: Sequence[Report]) -> Limit:
    """Make a limit of what the reports of one candidate for all layers each count.

    Raises:
        ConfigError: what is not chosen costs more with one candidate than with another.
    """
    of_row, of_all = _COUNTED[name]
    costs, fixed = [], []
    for report in reports:
        rows = {row.name: of_row(row) for row in report.rows}
        costs.append([sum(rows[layer] for layer in group) for group in groups])
        fixed.append(of_all(report) - sum(costs[-1]))
    if not np.allclose(fixed, fixed[0], rtol=1e-9, atol=0.5):
        raise ConfigError(f"bits.budget.{name}: what is not chosen costs more with one candidate than with another: "
                          "list its layers in quantization.keep_fp")
    cost = np.array(costs).T
    if name == "size_mb":
        return Limit(name, value, cost, fixed[0], value * MEGABYTE, lambda size: size / MEGABYTE)
    full = reports[0].totals["bops_fp32"]["conv_linear"]
    return Limit(name, value, cost, fixed[0], full / value, lambda bops: full / bops, at_most=False)
