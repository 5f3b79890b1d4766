"""Splitting a weight by the iteration of SVDQuant: errors and products of the reference, and what holds of any."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.transforms import low_rank_split

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "kit" / "lowrank.npz")
TAGS = {"i1": (1, None), "i20_early": (20, 1), "i20_full": (20, None), "i20_full_wonly": (20, None)}


def rounded(x, bits, group):
    """Symmetric, a scale for each group along the last axis, codes up to 2^(bits - 1) - 1."""
    top, blocks = 2 ** (bits - 1) - 1, x.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / top
    return ((blocks / torch.where(scale == 0, 1.0, scale)).round().clamp(-top, top) * scale).flatten(-2)


class Case:
    def __init__(self, name):
        self.w, self.x = (torch.from_numpy(GOLDEN[f"{name}/{key}"]).double() for key in "wx")
        self.rank, self.group, self.bits = (int(GOLDEN[f"{name}/{key}"]) for key in ("rank", "group", "bits"))

    def quantize(self, weight):
        return rounded(weight, self.bits, self.group)

    def error(self, branch, residual, weights_alone=False):
        x = self.x if weights_alone else rounded(self.x, self.bits, self.group)
        return float((self.x @ self.w.T - self.x @ branch.T - x @ residual.T).square().sum())


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", ["a", "c"])
def test_errors_and_products_of_the_reference(name, tag):
    case, errors = Case(name), []

    def error(branch, residual):
        errors.append(case.error(branch, residual, weights_alone=tag.endswith("wonly")))
        return errors[-1]

    iterations, patience = TAGS[tag]
    made = low_rank_split(case.w, case.rank, case.quantize, iterations, error=error, patience=patience)
    np.testing.assert_allclose(errors, GOLDEN[f"{name}/{tag}/errors"], rtol=1e-6)
    product = made.up @ made.down
    if f"{name}/{tag}/L" in GOLDEN:
        torch.testing.assert_close(product, torch.from_numpy(GOLDEN[f"{name}/{tag}/L"]).double(), rtol=0, atol=1e-5)
        assert errors[int(GOLDEN[f"{name}/{tag}/best_iter"])] == min(errors)
    assert case.error(product, case.quantize(made.residual), tag.endswith("wonly")) == pytest.approx(min(errors))
    assert min(errors) < 0.2 * float(GOLDEN[f"{name}/err_rtn_wx"])


def test_layers_that_share_a_factor_are_split_as_one():
    w = torch.from_numpy(GOLDEN["qkv/w"]).double()
    up, down, _ = low_rank_split(w, 8, lambda r: rounded(r, 4, 64), 1)
    torch.testing.assert_close(
        up @ down, torch.from_numpy(GOLDEN["qkv/L_first_iteration"]).double(), rtol=0, atol=1e-5 * float(w.abs().max())
    )


def test_the_parts_make_the_weight_and_have_their_form():
    case = Case("a")
    up, down, residual = low_rank_split(case.w, 5, case.quantize, 7)
    assert {part.dtype for part in (up, down, residual)} == {torch.float64}
    assert up.shape == (96, 5) and down.shape == (5, 128)
    torch.testing.assert_close(up @ down + residual, case.w, rtol=0, atol=1e-12)
    torch.testing.assert_close(down @ down.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_without_a_judge_the_weight_error_never_gets_worse_with_more_iterations():
    case, errors = Case("a"), []
    for iterations in (1, 2, 4, 8, 16):
        residual = low_rank_split(case.w, 16, case.quantize, iterations).residual
        errors.append(float((residual - case.quantize(residual)).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert errors[0] < float((case.w - case.quantize(case.w)).square().sum())


def test_a_weight_of_that_rank_leaves_nothing_over():
    torch.manual_seed(0)
    w = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    assert low_rank_split(w, 3, torch.round, 3).residual.abs().max() < 1e-12


def test_of_equal_errors_the_last_is_kept_and_what_is_not_finite_never():
    w, seen = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), []
    given = iter([5.0, 5.0, float("nan"), 6.0])

    def error(branch, residual):
        seen.append(branch.clone())
        return next(given)

    up, down, _ = low_rank_split(w, 1, lambda r: 0.5 * r, 4, error=error)
    assert torch.equal(up @ down, seen[1])
    given = iter([float("nan"), float("inf")])
    with pytest.raises(QuantizationError, match="finite error"):
        low_rank_split(w, 1, lambda r: r, 2, error=lambda *_: next(given))


def test_patience_counts_iterations_without_a_better_one():
    calls = []
    errors = iter([3.0, 4.0, 2.0, 5.0, 6.0, 1.0])

    def error(*_):
        calls.append(1)
        return next(errors)

    low_rank_split(torch.eye(4), 1, torch.round, 6, error=error, patience=2)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("shape", "rank", "iterations"), [((4, 4), 5, 1), ((4, 4), 0, 1), ((4, 4), 1, 0), ((4,), 1, 1)]
)
def test_impossible_sizes_are_refused(shape, rank, iterations):
    with pytest.raises(QuantizationError, match="low_rank_split: rank"):
        low_rank_split(torch.ones(shape), rank, torch.round, iterations)
