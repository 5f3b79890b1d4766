"""Widths by the signal-to-noise rule and by a budget, against enumeration of all assignments."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_exp.correction import budget_rows, forward_snr, snr_rows
from ptq_exp.diffusion import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError


def test_the_snr_rule_takes_the_lowest_width_that_is_enough():
    output = torch.tensor([[10.0, 100, 1000], [10, 100, 1000], [10, 100, 1000], [10, 100, 1000]])
    assert snr_rows(output, torch.tensor([5.0, 50, 500, 5000])).tolist() == [0, 1, 2, 2]


def test_forward_snr_rises_along_sampling():
    grid = TimeGrid.from_schedule(NoiseSchedule.latent_diffusion(), 10)
    snr = forward_snr(grid)
    alpha_bar = grid.alphas_cumprod[3]
    assert bool((snr.diff() > 0).all()) and float(snr[3]) == pytest.approx(float(alpha_bar / (1 - alpha_bar)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda s: st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=s, max_size=s)
    ),
    st.lists(st.integers(1, 40), min_size=3, max_size=3).map(sorted),
    st.floats(0, 1),
)
def test_the_budget_is_spent_as_well_as_by_enumeration(damage, cost, share):
    damage = torch.tensor(damage, dtype=torch.float64)
    steps = len(damage)
    budget = steps * (cost[0] + share * (cost[-1] - cost[0]))
    rows = budget_rows(damage, cost, budget)
    best = min(
        sum(float(damage[s, w]) for s, w in enumerate(choice))
        for choice in product(range(3), repeat=steps)
        if sum(cost[w] for w in choice) <= budget
    )
    assert sum(cost[w] for w in rows.tolist()) <= budget
    assert float(damage.gather(1, rows.view(-1, 1)).sum()) == pytest.approx(best, abs=1e-9)


def test_steps_of_one_time_get_one_width():
    damage = torch.tensor([[9.0, 0], [1, 0], [1, 0]])
    assert budget_rows(damage, [1, 2], 4).tolist() == [1, 0, 0]
    assert budget_rows(damage, [1, 2], 4, torch.tensor([0, 1, 0])).tolist() == [0, 1, 0]
    assert budget_rows(damage, [1, 2], 5, torch.tensor([0, 1, 0])).tolist() == [1, 0, 1]


def test_250_steps_and_three_widths_are_solved():
    damage = torch.rand(250, 3, generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values
    rows = budget_rows(damage, [4_000_000_007, 6_000_000_007, 8_000_000_007], 250 * 6_000_000_007)
    assert rows.unique().tolist() == [0, 1, 2]


def test_impossible_budgets_are_refused():
    with pytest.raises(ConfigError, match="a budget of 5 bit operations is below the 6"):
        budget_rows(torch.ones(3, 2), [2, 4], 5)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        budget_rows(torch.tensor([[float("nan"), 0.0]]), [2, 4], 5)
