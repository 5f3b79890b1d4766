"""The allocation of candidates to groups of layers, against brute force and golden problems."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from ptq_exp.errors import ConfigError, InfeasibleError
from ptq_exp.quantization import Allocation, Budget

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "kit" / "allocation.npz")
PROBLEMS = sorted({key.partition("/")[0] for key in GOLDEN})


def golden(name: str) -> Allocation:
    """The problem as it is stored; `mixdq` is one of the largest sum."""
    costs = [key for key in ("cost0", "cost1") if f"{name}/{key}" in GOLDEN]
    budgets = [
        Budget(GOLDEN[f"{name}/{key}"], float(GOLDEN[f"{name}/budget{key[-1]}"]),
               float(GOLDEN[f"{name}/lower{key[-1]}"]) if f"{name}/lower{key[-1]}" in GOLDEN else -math.inf)
        for key in costs
    ]
    score = GOLDEN[f"{name}/score"] * (-1 if name == "mixdq" else 1)
    return Allocation(score, budgets, "worst" if name == "minimax" else "sum")


def brute_force(problem: Allocation) -> list[tuple[float, tuple[int, ...]]]:
    """All choices within the budgets, the best first."""
    groups, candidates = problem.score.shape
    found = []
    for choice in itertools.product(range(candidates), repeat=groups):
        if all(budget.holds(choice) for budget in problem.budgets):
            scores = [problem.score[g, c] for g, c in enumerate(choice)]
            found.append((sum(scores) if problem.objective == "sum" else max(scores), choice))
    return sorted(found)


def test_there_are_eight_golden_problems():
    assert len(PROBLEMS) == 8


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "infeasible"])
def test_golden_problem(name):
    problem = golden(name)
    (found,) = problem.best()
    wanted = GOLDEN[f"{name}/objective"] * (-1 if name == "mixdq" else 1)
    assert found.score == pytest.approx(wanted, rel=1e-12)
    assert all(budget.holds(found.choice) for budget in problem.budgets)
    if GOLDEN[f"{name}/n_optima"] == 1:
        assert found.choice == tuple(GOLDEN[f"{name}/choice"])
        if problem.objective == "sum":
            first, second = problem.best(2)
            assert second.score - first.score == pytest.approx(GOLDEN[f"{name}/gap_to_second"], rel=1e-6)


def test_the_golden_gap_is_closed_where_a_lagrangian_stays_above():
    (found,) = golden("gap").best()
    assert found.score < GOLDEN["gap/lagrange_objective"] - 0.5


def test_what_cannot_be_met_says_the_least_that_can():
    problem = golden("infeasible")
    with pytest.raises(InfeasibleError, match="within all budgets"):
        problem.best()
    assert problem.least(0) == problem.budgets[0].cost.min(1).sum() == 4
    assert Allocation(problem.score, [Budget(problem.budgets[0].cost, 4)]).best()[0].choice == (0, 0, 0, 0)


def test_the_least_of_one_budget_with_another_in_force():
    score, size, time = np.zeros((2, 2)), np.array([[1.0, 3], [1, 3]]), np.array([[9.0, 2], [9, 2]])
    problem = Allocation(score, [Budget(size, 1), Budget(time, 11)])
    assert problem.least(0) == 4  # one group must be fast
    assert Allocation(score, [Budget(size, 1), Budget(time, 3)]).least(0) is None  # two fast groups take 4


def test_layers_that_share_a_choice():
    """Scores and costs of a group are the sums over its layers."""
    score = np.where(GOLDEN["tied/score"] < 1e9, GOLDEN["tied/score"], math.inf)
    (found,) = Allocation(score, [Budget(GOLDEN["tied/cost0"], float(GOLDEN["tied/budget0"]))]).best()
    assert found.choice == tuple(GOLDEN["tied/choice"])


@pytest.mark.parametrize("seed", range(6))
def test_the_best_ones_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape = (5, 3)
    size, time = rng.integers(1, 10**6, shape).astype(float), rng.random(shape)
    problem = Allocation(
        rng.random(shape) ** 4 * 1e-5, [Budget(size, float(np.median(size) * 5), 1e5), Budget(time, 2.6)]
    )
    wanted = brute_force(problem)[:7]
    assert [solution.choice for solution in problem.best(7)] == [choice for _, choice in wanted]


def test_distant_ones_differ_in_so_many_groups():
    score = np.random.default_rng(1).random((6, 3))
    found = Allocation(score).best(4, distance=3)
    assert found[0].choice == tuple(score.argmin(1))
    for one, other in itertools.combinations(found, 2):
        assert sum(a != b for a, b in zip(one.choice, other.choice, strict=True)) >= 3
    wanted = [choice for _, choice in brute_force(Allocation(score))
              if sum(a != b for a, b in zip(choice, found[0].choice, strict=True)) >= 3]
    assert found[1].choice == wanted[0]


def test_a_budget_is_exact_where_the_solver_is_not():
    """Two bits of 2 * 10^9 are within the solver's tolerance, and over the budget."""
    cost = np.array([[1e9, 1e9 + 2], [1e9, 1e9 + 2]])
    score = np.array([[1.0, 0.0], [1.0, 0.5]])
    assert Allocation(score, [Budget(cost, 2e9 + 1)]).best()[0].choice == (0, 0)
    assert Allocation(score, [Budget(cost, 2e9 + 2)]).best()[0].choice == (1, 0)
    assert Allocation(score, [Budget(cost, 2e9 + 4)]).best()[0].choice == (1, 1)


def test_a_forbidding_score_does_not_hide_the_others():
    score = np.array([[1e12, 2e-3, 1e-3], [1e12, 3e-3, 4e-3]])
    cost = np.array([[0.0, 1, 2], [0, 1, 2]])
    assert Allocation(score, [Budget(cost, 3)]).best()[0].choice == (2, 1)


def test_scores_far_below_the_gap_of_the_solver_are_told_apart():
    score = np.array([[3e-12, 1e-12, 2e-12]] * 3)
    assert Allocation(score, [Budget(np.array([[1.0, 9, 1]] * 3), 11)]).best()[0].choice in {
        (1, 2, 2)[i:] + (1, 2, 2)[:i] for i in range(3)
    }


def test_the_worst_group_counts_alone():
    rng = np.random.default_rng(3)
    for _ in range(4):
        problem = Allocation(rng.random((5, 3)), [Budget(rng.integers(1, 9, (5, 3)).astype(float), 20)], "worst")
        assert problem.best()[0].score == brute_force(problem)[0][0]


@pytest.mark.parametrize(
    ("score", "cost"),
    [([[1.0, 2.0]], [[1.0]]), ([[math.nan, 1.0]], [[1.0, 1.0]]), ([[1.0, 2.0]], [[math.inf, 1.0]]),
     ([[math.inf, math.inf]], [[1.0, 1.0]]), ([1.0, 2.0], [1.0, 2.0])],
)
def test_problems_without_meaning_are_refused(score, cost):
    with pytest.raises(ConfigError, match="an allocation needs"):
        Allocation(np.array(score), [Budget(np.array(cost), 1.0)])
