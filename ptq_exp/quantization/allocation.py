"""Choose one of several candidates for each group of layers: least score within budgets, solved exactly.

A multiple-choice knapsack: minimise sum_g s[g, c_g] with sum_g cost[g, c_g] <= budget for every cost, as a programme in
whole numbers (HiGHS). Its solutions obey constraints to a tolerance alone; here every choice is added up anew, and one
that is over a budget is cut off and solved again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ptq_exp.errors import ConfigError, InfeasibleError, PTQError

Choice = tuple[int, ...]
CUTS = 1000
"""Choices over a budget by less than the solver's tolerance that are cut off before the search is given up."""
SCALE = 1e6
"""Of the scores that HiGHS sees: it stops at a gap of 1e-6."""


@dataclass(frozen=True)
class Budget:
    """What the candidates cost, and how much of it there may be.

    Attributes:
        cost: [G, C] of each candidate for each group; whole numbers are added up exactly.
        upper: most that all groups together may cost, inclusive.
        lower: least that they may cost, inclusive.
    """

    cost: np.ndarray
    upper: float = math.inf
    lower: float = -math.inf

    def total(self, choice: Sequence[int]) -> float:
        """Return what a choice costs, without errors of rounding."""
        return math.fsum(self.cost[group, candidate] for group, candidate in enumerate(choice))

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within the budget."""
        return self.lower <= self.total(choice) <= self.upper


@dataclass(frozen=True)
class Solution:
    """A candidate for each group, and the score of all together."""

    choice: Choice
    score: float


@dataclass(frozen=True)
class Allocation:
    """Groups of layers, each of which gets one of C candidates.

    Attributes:
        score: [G, C], what is minimised; infinity forbids a candidate to a group.
        budgets: each with costs of the same shape.
        objective: the sum of the groups' scores, or the worst of them.

    Raises:
        ConfigError: shapes differ, a score is NaN or a cost not finite, or a group has no candidate.
    """

    score: np.ndarray
    budgets: Sequence[Budget] = ()
    objective: Literal["sum", "worst"] = "sum"

    def __post_init__(self) -> None:
        shape = np.shape(self.score)
        if len(shape) != 2 or 0 in shape or any(np.shape(budget.cost) != shape for budget in self.budgets):
            raise ConfigError(f"an allocation needs scores and costs [groups, candidates], found {shape} and "
                              f"{[np.shape(budget.cost) for budget in self.budgets]}")
        if np.isnan(self.score).any() or not all(np.isfinite(budget.cost).all() for budget in self.budgets):
            raise ConfigError("an allocation needs scores without NaN and finite costs")
        if not (self.score < math.inf).any(1).all():
            raise ConfigError("an allocation needs a candidate that is allowed for each group")

    def score_of(self, choice: Sequence[int]) -> float:
        """Return the score of a choice."""
        found = [float(self.score[group, candidate]) for group, candidate in enumerate(choice)]
        return math.fsum(found) if self.objective == "sum" else max(found)

    def best(self, k: int = 1, distance: int = 1) -> list[Solution]:
        """Find the `k` best choices within the budgets, the best first; fewer where there are no more.

        Args:
            distance: groups in which each differs from all before it, at least.

        Raises:
            InfeasibleError: no choice is within the budgets.
            PTQError: the solver gave up.
        """
        found: list[Solution] = []
        cuts: list[tuple[Choice, int]] = []
        while len(found) < k and (choice := self._solved(self.score, cuts)) is not None:
            found.append(Solution(choice, self.score_of(choice)))
            cuts.append((choice, distance))
        if not found:
            raise InfeasibleError("no choice of candidates is within all budgets")
        return found

    def least(self, number: int) -> float | None:
        """Return the least that budget `number` could be, the others in force; None where these cannot be met."""
        budget = self.budgets[number]
        others = [one for one in self.budgets if one is not budget]
        cost = np.where(self.score < math.inf, budget.cost, math.inf)
        cheapest = Allocation(cost, others)
        choice = cheapest._solved(cheapest.score, [])
        return None if choice is None else budget.total(choice)

    def _solved(self, score: np.ndarray, cuts: Sequence[tuple[Choice, int]]) -> Choice | None:
        """Return the best choice apart from the `cuts`; None if there is none."""
        cuts = list(cuts)
        for _ in range(CUTS):
            choice = _exact(score, self.budgets, self.objective, cuts)
            if choice is None or all(budget.holds(choice) for budget in self.budgets):
                return choice
            cuts.append((choice, 1))
        raise PTQError(f"the {CUTS} best choices are over a budget by less than the solver can tell: change the budget "
                       "a little")


def _exact(
    score: np.ndarray, budgets: Sequence[Budget], objective: str, cuts: Sequence[tuple[Choice, int]]
) -> Choice | None:
    """Solve again with scores in units of the solution's, until these are no smaller: the gap of HiGHS is absolute."""
    least = score.min(1, keepdims=True) if objective == "sum" else score.min()
    excess = score - least  # nothing below 0: a candidate above the best sum is in no better one
    unit, best = float(excess[excess < math.inf].max()), None
    while True:
        values = np.where(excess <= unit, excess, math.inf)
        choice = _milp(values / (unit or 1.0) * SCALE, budgets, objective, cuts)
        if choice is None:
            return best
        best = choice
        taken = excess[np.arange(len(choice)), choice]
        reached = math.fsum(taken) if objective == "sum" else float(taken.max())
        if reached == 0 or reached > unit / 10:
            return best
        unit = reached


def _milp(
    score: np.ndarray, budgets: Sequence[Budget], objective: str, cuts: Sequence[tuple[Choice, int]]
) -> Choice | None:
    """Solve by HiGHS, to its tolerance; None if nothing meets the constraints.

    Variables: x[g, c] = 1 if group g takes candidate c, and for the worst score one more that none may exceed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a while to load

    groups, candidates = score.shape
    worst = objective == "worst"
    n = groups * candidates
    allowed = (score < math.inf).ravel()
    values = np.where(allowed, score.ravel(), 0.0)
    rows = list(_constraints(budgets, cuts, groups, candidates))
    if worst:
        rows += [(row * values, -math.inf, 0.0) for row in np.kron(np.eye(groups), np.ones(candidates))]
    matrix = np.array([row for row, _, _ in rows])
    if worst:  # the last rows are "score of the group - worst <= 0"
        last = np.zeros((len(rows), 1))
        last[-groups:] = -1.0
        matrix = np.hstack([matrix, last])
    target = np.append(np.zeros(n), 1.0) if worst else values
    found = milp(
        target,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=np.append(np.ones(n), 0) if worst else np.ones(n),
        bounds=Bounds(np.append(np.zeros(n), -math.inf) if worst else 0.0,
                      np.append(allowed.astype(float), math.inf) if worst else allowed.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:  # infeasible
        return None
    if found.x is None or found.status != 0:
        raise PTQError(f"the allocation of bits was not solved: {found.message}")
    return tuple(int(c) for c in found.x[:n].reshape(groups, candidates).argmax(1))


def _constraints(
    budgets: Sequence[Budget], cuts: Sequence[tuple[Choice, int]], groups: int, candidates: int
) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """Yield (coefficients [G * C], lower, upper): one candidate per group, budgets, and what was cut off."""
    for row in np.kron(np.eye(groups), np.ones(candidates)):
        yield row, 1.0, 1.0
    for budget in budgets:
        cost = np.asarray(budget.cost, float).ravel()
        scale = np.abs(cost).max() or 1.0
        yield cost / scale, budget.lower / scale, budget.upper / scale
    for choice, distance in cuts:
        row = np.zeros((groups, candidates))
        row[np.arange(groups), choice] = 1.0
        yield row.ravel(), -math.inf, float(groups - distance)
