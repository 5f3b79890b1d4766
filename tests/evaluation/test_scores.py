"""Feature statistics as a file, scores of known distributions, KID as torch-fidelity has it, the half-split unit."""

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance as kernel_distance_of_clean_fid
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from ptq_exp.errors import DataError
from ptq_exp.evaluation import (
    SCORES,
    FeatureStatistics,
    GaussianStatistics,
    Score,
    extract_features,
    frechet_distance_from_features,
    half_split_fid,
    kernel_distance,
    load_statistics,
    prompt_accuracy,
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


def test_precision_and_recall_are_those_of_the_pooled_features():
    real = statistics()
    half_away = np.where(np.arange(40)[:, None] < 10, real.pooled + 100, real.pooled)
    values = score(FeatureStatistics(half_away, real.spatial, real.probabilities), real)
    assert values["precision"] == 0.75 and values["recall"] >= 0.75


def test_three_images_have_no_third_neighbour_and_one_no_pair():
    few, one = (FeatureStatistics(*(x[:n] for x in (statistics().pooled, statistics().spatial,
                                                    statistics().probabilities))) for n in (3, 1))
    assert set(score(few, statistics())) == set(score(statistics(), few)) == {"fid", "sfid", "is", "kid"}
    gaussian = GaussianStatistics(np.zeros(6), np.eye(6), features=one)
    assert set(score(statistics(), gaussian)) == {"fid", "is"}


def fidelity(a, b, size):
    """KID as torch-fidelity computes it with subsets of `size` rows."""
    metric = kid_features_to_metric(torch.as_tensor(a), torch.as_tensor(b), kid_subset_size=size, verbose=False)
    return metric[KEY_METRIC_KID_MEAN]


@pytest.mark.parametrize(("rows", "size"), [((60, 90), 60), ((80, 45), 45), ((50, 50), 50), ((70, 50), 20)])
def test_kid_is_that_of_torch_fidelity(rows, size):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((rows[0], 12)), rng.standard_normal((rows[1], 12)) * 1.2 + 0.3
    assert kernel_distance(a, b, subset_size=size) == pytest.approx(fidelity(a, b, size), rel=1e-9)
    assert kernel_distance(a, b, subset_size=size) == kernel_distance(a.copy(), b.copy(), subset_size=size)


def test_kid_of_whole_sets_is_that_of_clean_fid_and_subsets_scatter_about_it():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 5)), rng.standard_normal((300, 5)) + 0.5
    whole = kernel_distance(a, b)
    assert whole == pytest.approx(kernel_distance_of_clean_fid(a, b, num_subsets=1), rel=1e-9)
    assert kernel_distance(a, b, subset_size=100) == pytest.approx(whole, rel=0.1)
    assert kernel_distance(a, b, subset_size=100, seed=1) != kernel_distance(a, b, subset_size=100)


def test_kid_is_without_bias():
    rng = np.random.default_rng(1)
    values = [kernel_distance(*rng.standard_normal((2, 20, 3))) for _ in range(300)]
    assert min(values) < 0 and abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_kid_refuses_what_has_no_pairs_or_other_features():
    with pytest.raises(DataError, match="at least 2 rows"):
        kernel_distance(np.ones((1, 3)), np.ones((4, 3)))
    with pytest.raises(DataError, match="found 3 and 2"):
        kernel_distance(np.ones((4, 3)), np.ones((4, 2)))


def test_a_score_is_added_by_one_entry(monkeypatch):
    mean_of_first = Score("mean", 1, function=lambda images: float(images.generated.pooled[:, 0].mean()))
    monkeypatch.setitem(SCORES, "mean_of_first", mean_of_first)
    generated = statistics(1)
    assert score(generated, statistics())["mean_of_first"] == pytest.approx(generated.pooled[:, 0].mean())


def test_gaussians_score_as_the_features_they_were_fitted_to(tmp_path):
    real, generated = statistics(), statistics(1, rows=30, shift=0.5)
    gaussians = GaussianStatistics(
        real.pooled.mean(0), np.cov(real.pooled, rowvar=False),
        real.spatial.mean(0), np.cov(real.spatial, rowvar=False), name="both", extractor="e", features=real,
    )
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
    )
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


def features_that_see(classes):
    n = len(classes)
    return FeatureStatistics(np.eye(max(n, 4))[:n], np.eye(max(n, 4))[:n], np.eye(10)[list(classes)] * 0.8 + 0.02)


def test_prompt_accuracy_is_the_share_of_images_with_the_class_asked_for():
    seen = features_that_see([3, 3, 7, 0, 9])
    assert prompt_accuracy(seen, [3, 1, 7, 0, 8]) == 0.6
    assert score(seen, statistics_of_size(5), [3, 3, 7, 0, 9])["prompt_accuracy"] == 1
    assert "prompt_accuracy" not in score(seen, statistics_of_size(5))


def statistics_of_size(width, rows=20):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, width))
    return FeatureStatistics(features, features, rng.dirichlet(np.ones(10), rows))


@pytest.mark.parametrize(
    ("classes", "message"),
    [([3, 3], "for each of 5"), ([3, 3, 7, 0, 10], "0..10"), ([3, -1, 7, 0, 1], "-1..7"), ([0.5] * 5, "integer")],
)
def test_prompt_accuracy_refuses_other_classes(classes, message):
    with pytest.raises(DataError, match=message):
        prompt_accuracy(features_that_see([3, 3, 7, 0, 9]), classes)
