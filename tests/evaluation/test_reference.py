"""Feature statistics as a file, scores of known distributions, and the half-split unit."""

import numpy as np
import pytest

from ptq_exp.errors import DataError
from ptq_exp.evaluation import FeatureStatistics, frechet_distance_from_features, half_split_fid, score


def statistics(seed=0, rows=40, shift=0.0):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(10), rows).astype(np.float32)
    pooled = rng.standard_normal((rows, 6)).astype(np.float32) + shift
    return FeatureStatistics(pooled, rng.standard_normal((rows, 9)), probabilities, name="digits train")


def test_save_and_load_lose_nothing(tmp_path):
    original = statistics()
    original.save(tmp_path / "deep" / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "deep" / "reference.npz")
    assert loaded.name == "digits train" and len(loaded) == 40
    for field in ("pooled", "spatial", "probabilities"):
        before, after = getattr(original, field), getattr(loaded, field)
        assert before.dtype == after.dtype and np.array_equal(before, after)


def test_a_truncated_or_foreign_file_is_a_data_error(tmp_path):
    path = tmp_path / "reference.npz"
    statistics().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="reference.npz"):
        FeatureStatistics.load(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(DataError, match="is no readable file of feature statistics"):
        FeatureStatistics.load(path)
    with pytest.raises(DataError, match="missing.npz"):
        FeatureStatistics.load(tmp_path / "missing.npz")


def test_arrays_must_agree_about_the_number_of_images():
    with pytest.raises(DataError, match=r"\(3, 2\)"):
        FeatureStatistics(np.ones((3, 2)), np.ones((4, 2)), np.ones((3, 2)))
    with pytest.raises(DataError, match=r"\[N, \.\.\.\]"):
        FeatureStatistics(np.ones((3, 2)), np.ones((3, 2, 2)), np.ones((3, 2)))


def test_score_compares_each_feature_with_its_own_kind():
    real = statistics()
    shifted = FeatureStatistics(real.pooled + 2, real.spatial + 3, np.eye(10).repeat(4, axis=0))
    # the covariance is unchanged, so the distance is the squared shift of the mean: 6 * 4 and 9 * 9
    values = score(shifted, real)
    assert values["fid"] == pytest.approx(24, rel=1e-5)
    assert values["sfid"] == pytest.approx(81, rel=1e-5)
    assert values["is"] == pytest.approx(10)


def test_half_split_is_reproducible_disjoint_and_falls_with_more_data():
    features = statistics(rows=2001).pooled
    unit = half_split_fid(features, seeds=[1, 2])
    assert unit == half_split_fid(features, seeds=[1, 2])
    assert unit == pytest.approx(np.mean([half_split_fid(features, [1]), half_split_fid(features, [2])]))
    assert unit < half_split_fid(features[:200], seeds=[1, 2])
    # two alternating point clouds: overlapping halves, or a constant split, would give another value
    order = np.random.default_rng(7).permutation(4)
    points = np.array([[0.0], [1.0], [10.0], [100.0]])
    expected = frechet_distance_from_features(points[order[:2]], points[order[2:]])
    assert half_split_fid(points, [7]) == pytest.approx(expected)


def test_half_split_needs_rows_and_seeds():
    with pytest.raises(DataError, match="4 rows"):
        half_split_fid(np.ones((3, 2)))
    with pytest.raises(DataError, match="1 seed"):
        half_split_fid(np.ones((8, 2)), [])
