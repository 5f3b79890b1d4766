"""Feature statistics as a file, scores of known distributions, and the half-split unit."""

import numpy as np
import pytest

from ptq_exp.errors import DataError
from ptq_exp.evaluation import (
    FeatureStatistics,
    GaussianStatistics,
    extract_features,
    frechet_distance_from_features,
    half_split_fid,
    load_statistics,
    score,
)


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


def test_precision_and_recall_are_those_of_the_pooled_features_and_can_be_left_out():
    real = statistics()
    half_away = np.where(np.arange(40)[:, None] < 10, real.pooled + 100, real.pooled)
    generated = FeatureStatistics(half_away, real.spatial, real.probabilities)
    values = score(generated, real)
    assert values["precision"] == 0.75 and values["recall"] >= 0.75
    fewer = score(generated, real, with_precision_recall=False)
    assert fewer == {key: values[key] for key in ("fid", "sfid", "is")}


def test_three_images_have_no_third_neighbour():
    few = FeatureStatistics(*(x[:3] for x in (statistics().pooled, statistics().spatial, statistics().probabilities)))
    assert set(score(few, statistics())) == set(score(statistics(), few)) == {"fid", "sfid", "is"}


def test_gaussians_score_as_the_features_they_were_fitted_to(tmp_path):
    real, generated = statistics(), statistics(1, rows=30, shift=0.5)
    gaussians = GaussianStatistics(
        real.pooled.mean(0), np.cov(real.pooled, rowvar=False),
        real.spatial.mean(0), np.cov(real.spatial, rowvar=False), name="both", extractor="e", features=real,
    )  # fmt: skip
    assert score(generated, gaussians) == pytest.approx(score(generated, real), rel=1e-4)
    gaussians.save(tmp_path / "g.npz")
    loaded = load_statistics(tmp_path / "g.npz")
    assert isinstance(loaded, GaussianStatistics) and (loaded.name, loaded.extractor) == ("both", "e")
    assert (loaded.features.name, len(loaded.features)) == ("digits train", 40)
    assert score(generated, loaded) == score(generated, gaussians)
    # fewer generated images than features: a singular covariance against one of full rank
    few = statistics(2, rows=5)
    assert score(few, gaussians)["fid"] == pytest.approx(score(few, real)["fid"], rel=1e-4)


def test_either_kind_is_loaded_and_others_are_named(tmp_path):
    statistics().save(tmp_path / "f.npz")
    assert isinstance(load_statistics(tmp_path / "f.npz"), FeatureStatistics)
    np.savez(tmp_path / "x.npz", pooled=np.ones((3, 2)), a=np.ones(2))
    with pytest.raises(DataError, match=r"found the arrays pooled, a; expected pooled, spatial, probabilities or mu"):
        load_statistics(tmp_path / "x.npz")


def test_files_without_the_name_of_an_extractor_are_read(tmp_path):
    real = statistics()
    arrays = {"pooled": real.pooled, "spatial": real.spatial, "probabilities": real.probabilities}
    np.savez(tmp_path / "old.npz", name="old", **arrays)
    loaded = FeatureStatistics.load(tmp_path / "old.npz")
    assert (loaded.name, loaded.extractor) == ("old", "")


def test_features_do_not_depend_on_batches_and_progress_counts_images(toy, colour_images):
    done = []
    whole, parts = extract_features(toy, colour_images), extract_features(
        toy, colour_images, name="n", batch_size=20, progress=done.append
    )  # fmt: skip
    assert done == [20, 20, 10] and (parts.name, parts.extractor) == ("n", "toy")
    for field in ("pooled", "spatial", "probabilities"):
        assert np.array_equal(getattr(whole, field), getattr(parts, field))
    with pytest.raises(DataError, match="no images"):
        extract_features(toy, colour_images[:0])


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
