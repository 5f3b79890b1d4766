"""Errors of many candidates at once: against direct evaluation, closed forms, and values spread over the bins."""

import numpy as np
import pytest
import torch

from ptq_exp.quantization.affine import QRange, choose_qparams, fake_quantize
from ptq_exp.quantization.ranges.metrics import BLOCK, CodeDivergence, HistogramErrors, ValueErrors

METRICS = ("mse", "l1", "lp", "cosine")


def direct(x: torch.Tensor, q: torch.Tensor, metric: str) -> float:
    x, q = x.double(), q.double()
    if metric == "cosine":
        return float(1 - (x @ q) / (x.norm() * q.norm()))
    return float((x - q).abs().pow({"mse": 2, "l1": 1, "lp": 2.4}[metric]).mean())


def candidates(low: torch.Tensor, high: torch.Tensor, bits: int) -> QRange:
    """Clipping one end, the other, both, none."""
    a, b = torch.tensor([[1.0, 0.3, 1.0, 0.5, 0.9]]), torch.tensor([[1.0, 1.0, 0.2, 0.6, 0.8]])
    return choose_qparams(low[:, None] * a, high[:, None] * b, bits, symmetric=False)


def each(grid: QRange):
    for cell in range(grid.scale.shape[0]):
        for k in range(grid.scale.shape[1]):
            yield cell, k, QRange(*(part[cell, k] for part in grid))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("cells", "n"), [(3, 40), (1, BLOCK + 77), (400, 700)])
def test_values_match_direct_evaluation_up_to_a_factor_per_cell(metric, cells, n):
    rows = torch.randn(cells, n, generator=torch.Generator().manual_seed(1)) + 0.2
    low, high = rows.amin(1), rows.amax(1)
    grid = candidates(low, high, 4)
    found = ValueErrors(rows, metric, (high - low)[:, None] / 15).errors(grid).double()
    chosen = [(c, k, q) for c, k, q in each(grid) if c in (0, cells - 1)]
    expected = {(c, k): direct(rows[c], fake_quantize(rows[c], *q), metric) for c, k, q in chosen}
    for c, k, _ in chosen:
        assert float(found[c, k] / found[c, 0]) == pytest.approx(expected[c, k] / expected[c, 0], rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("metric", METRICS)
def test_histogram_equals_many_values_spread_evenly_over_each_bin(metric, bits):
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 50, (2, 60), generator=generator)
    width = torch.tensor([[0.125], [0.5]])
    edges = width * torch.arange(-20, 41)
    spread = (torch.arange(400) + 0.5) / 400
    points = (edges[:, :-1, None] + width[:, :, None] * spread).double()
    grid = candidates(edges[:, 0], edges[:, -1], bits)
    found = HistogramErrors(edges, counts, metric, width).errors(grid).double()
    for cell, k, q in each(grid):
        x, weight = points[cell], counts[cell, :, None].double() / (400 * counts[cell].sum())
        out = fake_quantize(x, *(part.double() for part in q))
        if metric == "cosine":
            expected = 1 - (weight * x * out).sum() / ((weight * x * x).sum() * (weight * out * out).sum()).sqrt()
        else:
            p = {"mse": 2.0, "l1": 1.0, "lp": 2.4}[metric]
            expected = (weight * (x - out).abs() ** p).sum() / float(width[cell]) ** p
        assert float(found[cell, k]) == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize(("metric", "p"), [("mse", 2.0), ("l1", 1.0), ("lp", 2.4)])
def test_uniform_data_in_bins_wider_than_a_step_has_the_textbook_error(metric, p):
    """A bin of exactly 4 steps: bin centres all lie on one phase of the grid, yet the error is (s/2)^p / (p + 1)."""
    edges = torch.arange(0.0, 65.0)[None]
    grid = choose_qparams(torch.tensor([[0.0]]), torch.tensor([[63.75]]), 8, symmetric=True)
    assert grid.scale == 0.25
    found = HistogramErrors(edges[:, :61], torch.ones(1, 60), metric, torch.ones(1, 1)).errors(grid)
    assert float(found) == pytest.approx(0.125**p / (p + 1), rel=1e-4)


def test_cosine_of_a_quantizer_that_returns_zero_is_the_worst():
    rows = torch.full((1, 8), 0.1)
    grid = choose_qparams(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.3, 3.0]]), 2, symmetric=True)
    assert ValueErrors(rows, "cosine", torch.ones(1, 1)).errors(grid).tolist() == [[pytest.approx(0, abs=1e-6), 1]]


def test_divergence_by_hand():
    """Bins 0..3 of width 1 with 4, 4, 1, 3 values; scale 2: codes 0 | 1 1 | 2, and code 1 mixes 4 with 1."""
    grid = choose_qparams(torch.tensor([[0.0]]), torch.tensor([[6.0]]), 2, symmetric=True)
    assert grid.scale == 2
    source = CodeDivergence(torch.ones(1, 1), 0, torch.tensor([[4, 4, 1, 3]]), bits=2)
    expected = (4 * np.log(4 / 2.5) + 1 * np.log(1 / 2.5)) / 12
    assert float(source.errors(grid)) / 2**40 == pytest.approx(expected, rel=1e-9)


def test_divergence_of_clipped_bins_counts_to_the_outermost_code():
    """Scale 1, codes 0..3, bin centres -0.5..5.5 (ties to the upper code): bins 3, 4, 5 share code 3."""
    grid = choose_qparams(torch.tensor([[0.0]]), torch.tensor([[3.0]]), 2, symmetric=True)
    counts = torch.tensor([[8, 4, 2, 2, 0, 4]])
    found = float(CodeDivergence(torch.ones(1, 1), 0, counts, bits=2).errors(grid)) / 2**40
    # Centres 0.5, 1.5, 2.5 reach codes 1, 2, 3; 3.5 and 5.5 are clipped to 3; the empty bin takes no share.
    expected = sum(c * np.log(c / (8 / 3)) for c in (2, 2, 4)) / 20
    assert found == pytest.approx(expected, rel=1e-9)


def test_divergence_ignores_differences_of_rounding():
    counts = torch.randint(1, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    grid = choose_qparams(torch.zeros(1, 3), torch.tensor([[60.0, 59.9, 59.8]]), 8, symmetric=True)
    assert CodeDivergence(torch.ones(1, 1), 0, counts, bits=8).errors(grid).tolist() == [[0, 0, 0]]
