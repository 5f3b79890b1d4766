"""Precision and recall against the ADM evaluator's stored numbers, a definition spelt out, and known cases."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.errors import DataError
from ptq_exp.evaluation import manifold, precision_recall

GOLDEN = Path(__file__).parents[1] / "golden"


def by_definition(real, generated, k):
    """Share of `generated` inside a ball around any of `real`, pair by pair in float64."""
    radii = [sorted(np.sum((a - b) ** 2) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    return np.mean([any(np.sum((x - a) ** 2) <= r for a, r in zip(real, radii, strict=True)) for x in generated])


def test_the_reference_evaluators_numbers():
    with np.load(GOLDEN / "metrics_d64.npz") as inputs, np.load(GOLDEN / "metrics_d64_manifold.npz") as stored:
        precision, recall = precision_recall(inputs["ref"], inputs["gen"])
        assert precision == pytest.approx(float(stored["prec_fp32"]), abs=1e-9)
        assert recall == pytest.approx(float(stored["rec_fp32"]), abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 100, 2**25])  # one row at a time, several, all
def test_the_definition_at_every_block_size(k, block, monkeypatch):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((31, 4)), 0.8 * rng.standard_normal((23, 4)) + 0.5
    precision, recall = precision_recall(real, generated, k)
    assert precision == pytest.approx(by_definition(real, generated, k))
    assert recall == pytest.approx(by_definition(generated, real, k))


def test_collapse_is_precise_and_does_not_recall():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 2)).astype(np.float32)
    collapsed = real[:1] + 1e-4 * rng.standard_normal((50, 2)).astype(np.float32)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0 and recall <= 0.01
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_duplicates_have_balls_of_radius_zero_that_hold_themselves():
    real = np.repeat(np.eye(3), 4, axis=0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 0.1) == (0.0, 0.0)


def test_a_large_offset_does_not_matter():
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((60, 8)), rng.standard_normal((60, 8)) + 0.5
    shifted = precision_recall(torch.from_numpy(real + 100), torch.from_numpy(generated + 100))
    assert shifted == precision_recall(real, generated)


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.ones((3, 2)), np.ones((9, 2)), 3, "N > k = 3"),
        (np.ones((9, 2)), np.ones(9), 3, "generated must be features"),
        (np.ones((9, 2)), np.ones((9, 3)), 3, "found 2 and 3"),
        (np.ones((9, 2)), np.full((9, 2), np.nan), 3, "NaN"),
        (np.ones((9, 2)), np.ones((9, 2)), 0, "k >= 1"),
    ],
)
def test_wrong_features_are_data_errors(real, generated, k, message):
    with pytest.raises(DataError, match=message):
        precision_recall(real, generated, k)
