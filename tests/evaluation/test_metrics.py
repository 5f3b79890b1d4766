"""IS and Fréchet distance against the ADM evaluator's stored numbers, closed forms and wrong input."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptq_exp.errors import DataError
from ptq_exp.evaluation import frechet_distance, frechet_distance_from_features, inception_score

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    with np.load(GOLDEN / f"metrics_{name}.npz") as archive:
        return {key: archive[key] for key in archive}


def symmetric(upper, dimension):
    full = np.zeros((dimension, dimension))
    full[np.triu_indices(dimension)] = upper
    return full + np.triu(full, 1).T


def gaussian(seed, rows, columns, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)) @ rng.standard_normal((columns, columns)) * scale


# ---- Fréchet distance against the reference evaluator


def test_features_match_the_reference_evaluator():
    stored = golden("d64")
    fid = frechet_distance_from_features(stored["gen"], stored["ref"])
    assert fid == pytest.approx(float(stored["fid"]), rel=1e-6)
    assert frechet_distance_from_features(stored["ref"], stored["gen"]) == pytest.approx(fid, rel=1e-9)


def test_statistics_match_the_reference_evaluator():
    stored = golden("d128")
    fid = frechet_distance(
        stored["mu_ref"],
        symmetric(stored["sigma_ref_upper"], 128),
        stored["mu_gen"],
        symmetric(stored["sigma_gen_upper"], 128),
    )
    assert fid == pytest.approx(float(stored["fid"]), rel=1e-6)


def test_spatial_features_match_the_reference_evaluator():
    stored = golden("spatial")
    sfid = frechet_distance_from_features(stored["ref"], stored["gen"])
    assert sfid == pytest.approx(float(stored["sfid"]), rel=1e-6)


def test_rank_deficient_features_match_the_reference_evaluator():
    stored = golden("deficient")
    ref, gen = stored["ref"], stored["gen"]
    assert len(ref) < ref.shape[1]
    expected = float(stored["fid"])
    assert frechet_distance_from_features(ref, gen) == pytest.approx(expected, rel=1e-6)
    mu_ref, mu_gen = ref.mean(0, dtype=float), gen.mean(0, dtype=float)
    from_statistics = frechet_distance(mu_ref, np.cov(ref, rowvar=False), mu_gen, np.cov(gen, rowvar=False))
    assert from_statistics == pytest.approx(expected, rel=1e-6)


# ---- Fréchet distance against closed forms and an independent route


def test_diagonal_gaussians_have_a_closed_form():
    mu1, mu2 = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    s1, s2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 25.0])  # a zero variance is a singular covariance
    # |mu|^2 = 1 + 0 + 4, and per axis (sqrt s1 - sqrt s2)^2 = 4 + 0 + 25
    assert frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(34.0, rel=1e-12)


@pytest.mark.parametrize(("rows_a", "rows_b"), [(200, 300), (9, 300), (300, 9), (9, 11), (20, 20), (21, 21)])
def test_every_shape_agrees_with_scipy_sqrtm(rows_a, rows_b):
    a, b = gaussian(0, rows_a, 20), gaussian(1, rows_b, 20, scale=1.3) + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm((cov_a + 1e-13 * np.eye(20)) @ (cov_b + 1e-13 * np.eye(20)))
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real
    assert frechet_distance_from_features(a, b) == pytest.approx(expected, rel=1e-5)


def test_identical_features_are_at_distance_zero_and_never_below():
    for rows in (10, 200):
        a = gaussian(2, rows, 20)
        distance = frechet_distance_from_features(a, a)
        assert 0 <= distance < 1e-9 * np.trace(np.cov(a, rowvar=False))


def test_constant_features_leave_the_mean_difference():
    a, b = np.full((50, 4), 3.0), np.full((60, 4), 1.0)
    assert frechet_distance_from_features(a, b) == pytest.approx(16.0, rel=1e-12)


def test_small_features_of_a_singular_covariance_are_not_taken_for_rounding():
    # one huge variance, 37 zeros, and a block whose only non-zero eigenvalue is 2 in s1 and 8 in s2
    s1 = np.zeros((40, 40))
    s1[0, 0] = 1e15
    s2 = s1.copy()
    s1[38:, 38:], s2[38:, 38:] = 1.0, 4.0
    expected = (np.sqrt(8) - np.sqrt(2)) ** 2  # 10 if the block is dropped
    # the traces are about 1e15: float64 leaves one digit behind the point
    assert frechet_distance(np.zeros(40), s1, np.zeros(40), s2) == pytest.approx(expected, abs=0.6)


@given(shift=st.floats(-5, 5), scale=st.floats(0.1, 10), rows=st.sampled_from([6, 40]))
@settings(max_examples=25, deadline=None)
def test_rotation_keeps_the_distance_and_scale_squares_into_it(shift, scale, rows):
    a, b = gaussian(3, rows, 8), gaussian(4, 50, 8) + shift
    rotation = np.linalg.qr(gaussian(5, 8, 8))[0]
    distance = frechet_distance_from_features(a, b)
    assert frechet_distance_from_features(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-7)
    scaled = frechet_distance_from_features(a * scale, b * scale)
    assert scaled == pytest.approx(distance * scale**2, rel=1e-7)


def test_float32_float64_numpy_and_torch_are_accepted():
    a, b = gaussian(6, 100, 8), gaussian(7, 100, 8)
    expected = frechet_distance_from_features(a, b)
    for convert in (np.float32, torch.from_numpy, lambda x: torch.from_numpy(x).float().requires_grad_()):
        assert frechet_distance_from_features(convert(a), convert(b)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 4)), np.ones((9, 4)), "at least 2 rows"),
        (np.ones((9, 4)), np.ones((9, 5)), "same feature dimension, found 4 and 5"),
        (np.ones((9, 4)), np.full((9, 4), np.nan), "36 NaN or infinite"),
        (np.full((9, 4), np.inf), np.ones((9, 4)), "NaN or infinite"),
        (np.ones((9, 2, 2)), np.ones((9, 4)), "2 dimension"),
    ],
)
def test_wrong_features_are_data_errors(a, b, message):
    with pytest.raises(DataError, match=message):
        frechet_distance_from_features(a, b)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(2), np.eye(3), "same feature dimension"),
        (np.zeros(3), np.ones((3, 2)), "square"),
        (np.zeros(3), np.eye(3) - np.eye(3, k=1), "symmetric"),
        (np.zeros(3), np.diag([1.0, 1.0, -1.0]), "negative eigenvalue"),
    ],
)
def test_wrong_statistics_are_data_errors(mu, sigma, message):
    good = (np.zeros(3), np.eye(3))
    with pytest.raises(DataError, match=message):
        frechet_distance(mu, sigma, *good)
    with pytest.raises(DataError, match=message):
        frechet_distance(*good, mu, sigma)


# ---- Inception Score


@pytest.mark.parametrize("chunk", [5000, 500, 700])
def test_inception_score_matches_the_reference_evaluator(chunk):
    stored = golden("d64")
    logits = torch.from_numpy(stored["gen"] @ stored["W"])
    score = inception_score(torch.softmax(logits, dim=1), chunk=chunk)
    assert score == pytest.approx(float(stored[f"is_split{chunk}"]), rel=1e-6)


def test_inception_score_extremes():
    assert inception_score(np.eye(10)) == pytest.approx(10.0)  # certain and diverse; 0 log 0 = 0
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1.0)  # uncertain
    assert inception_score(np.eye(10)[[3] * 7]) == pytest.approx(1.0)  # all alike


def test_a_short_last_chunk_counts_as_much_as_the_others():
    p = np.concatenate([np.eye(4), np.full((2, 4), 0.25)])
    assert inception_score(p, chunk=4) == pytest.approx((4.0 + 1.0) / 2)


@given(hnp.arrays(np.float64, (12, 5), elements=st.floats(0.01, 1)), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_inception_score_stays_between_one_and_the_number_of_classes(x, chunk):
    p = x / x.sum(axis=1, keepdims=True)
    assert 1 - 1e-12 <= inception_score(p, chunk) <= 5 + 1e-12
    assert inception_score(p) == pytest.approx(inception_score(p[::-1]), rel=1e-12)


@pytest.mark.parametrize(
    ("p", "chunk", "message"),
    [
        (np.array([[0.5, 0.6]]), 10, "logits"),
        (np.array([[-0.5, 1.5]]), 10, "softmax"),
        (np.array([[np.nan, 1.0]]), 10, "NaN"),
        (np.zeros((0, 3)), 10, "at least one image"),
        (np.ones(3), 10, "2 dimension"),
        (np.eye(3), 0, "chunk >= 1"),
    ],
)
def test_wrong_probabilities_are_data_errors(p, chunk, message):
    with pytest.raises(DataError, match=message):
        inception_score(p, chunk)
