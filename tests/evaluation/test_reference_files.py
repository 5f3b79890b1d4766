"""References of every kind give the same scores; wrong ones say what was found."""

import numpy as np
import pytest

from ptq_exp.errors import DataError
from ptq_exp.evaluation import (
    FeatureStatistics,
    GaussianStatistics,
    extract_features,
    load_reference,
    load_statistics,
    score,
)


@pytest.fixture
def generated(toy):
    images = np.random.default_rng(1).integers(0, 240, (40, 32, 32, 3), dtype=np.uint8)
    return extract_features(toy, images)


@pytest.fixture
def real(toy, colour_images):
    return extract_features(toy, colour_images, name="real")


def gaussians(features):
    """mu, sigma, mu_s, sigma_s as the ADM evaluator writes them: its maps have the channel last."""
    maps = features.spatial.reshape(-1, 7, 2, 2).transpose(0, 2, 3, 1).reshape(-1, 28)
    pairs = {"mu": features.pooled, "mu_s": maps}
    means = {key: x.mean(axis=0) for key, x in pairs.items()}
    return means | {key.replace("mu", "sigma"): np.cov(x, rowvar=False) for key, x in pairs.items()}


def failure(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load_reference(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_gives_the_same_scores(tmp_path, toy, colour_images, real, generated, write_folder, write_cifar):
    stored = gaussians(real)
    gaussian = GaussianStatistics(real.pooled.mean(0), np.cov(real.pooled, rowvar=False), features=real)
    archives = {
        "images": {"arr_0": colour_images},
        "adm": stored | {"arr_0": colour_images},
        "statistics": stored,
        "clean-fid": {"mu": stored["mu"], "sigma": stored["sigma"]},
    }
    paths = {name: tmp_path / f"{name}.npz" for name in [*archives, "features", "gaussian"]}
    for name, arrays in archives.items():
        np.savez(paths[name], **arrays)
    real.save(paths["features"])
    gaussian.save(paths["gaussian"])
    paths |= {"folder": write_folder(colour_images), "cifar": write_cifar(colour_images)}
    pairs = {"kid", "precision", "recall"}  # what needs features of real images
    all_keys = {"fid", "sfid", "is"} | pairs
    missing = {"statistics": pairs, "clean-fid": pairs | {"sfid"}, "gaussian": {"sfid"}}

    expected = score(generated, real)
    assert set(expected) == all_keys and 0 < expected["recall"] < 1 and expected["sfid"] > 0.01
    for name, path in paths.items():
        values = score(generated, load_reference(path, toy))
        assert set(values) == all_keys - missing.get(name, set()), name
        assert values == pytest.approx({key: expected[key] for key in values}, rel=1e-4), name


def test_stored_gaussians_are_preferred_to_those_of_the_images(tmp_path, toy, colour_images, real, generated):
    stored = gaussians(real)
    stored["mu"] = stored["mu"] + 3
    np.savez(tmp_path / "virtual.npz", arr_0=colour_images, **stored)
    values, expected = score(generated, load_reference(tmp_path / "virtual.npz", toy)), score(generated, real)
    assert values["fid"] > expected["fid"] + 40
    assert values["precision"] == expected["precision"] and values["recall"] == expected["recall"]


def test_names_tell_the_file_and_the_number_of_images(tmp_path, toy, colour_images, real):
    np.savez(tmp_path / "images.npz", arr_0=colour_images)
    np.savez(tmp_path / "adm.npz", arr_0=colour_images, **gaussians(real))
    np.savez(tmp_path / "mu.npz", **gaussians(real))
    names = [load_reference(tmp_path / f"{name}.npz", toy, n_max=20).name for name in ("images", "adm", "mu")]
    assert names == ["images.npz, 20 images", "adm.npz, stored statistics, 20 images", "mu.npz, stored statistics"]


def test_n_max_batches_and_progress(tmp_path, toy, colour_images):
    np.savez(tmp_path / "images.npz", arr_0=colour_images)
    done = []
    reference = load_reference(tmp_path / "images.npz", toy, n_max=25, batch_size=10, progress=done.append)
    assert len(reference) == 25 and toy.batches == done == [10, 10, 5]
    assert np.allclose(reference.pooled, extract_features(toy, colour_images[::2]).pooled)


def test_the_size_of_the_model_and_the_split_reach_the_images(tmp_path, toy, colour_images, write_cifar):
    np.savez(tmp_path / "images.npz", arr_0=colour_images)
    assert "the model expects 64x64" in failure(tmp_path / "images.npz", toy, size=64)
    assert "the model expects 1" in failure(tmp_path / "images.npz", toy, channels=1)
    assert len(load_reference(write_cifar(colour_images), toy, split="test")) == 1


def test_foreign_files_name_what_they_hold(tmp_path, toy, colour_images):
    path = tmp_path / "x.npz"
    assert "evaluation.reference=" in failure(path, toy) and "no such file" in failure(path, toy)
    np.savez(path, feats=np.ones(3), labels=np.ones(3))
    assert "found the arrays feats, labels; expected images in arr_0, or statistics mu" in failure(path, toy)
    np.savez(path, mu=np.ones(5))
    assert "found the arrays mu; expected" in failure(path, toy)
    np.savez(path, mu=np.ones(5), sigma=np.eye(4))
    assert "need mu [D] and sigma [D, D], found [(5,), (4, 4)]" in failure(path, toy)
    np.savez(path, mu=np.ones(5), sigma=np.eye(5), mu_s=np.ones(28))
    assert "sigma_s" in failure(path, toy)
    np.savez(path, mu=np.ones(5), sigma=np.eye(5), mu_s=np.ones(29), sigma_s=np.eye(29))
    assert "29 values, which is no square map of 7 channels" in failure(path, toy)
    path.write_text("<html>")
    assert "no readable .npz file" in failure(path, toy)


def test_statistics_of_another_extractor_are_refused(tmp_path, toy, real, generated, colour_images):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.ones(2048), sigma=np.eye(2048))
    assert "x.npz, stored statistics has 2048 pooled features, toy gives 5" in failure(path, toy)
    other = load_statistics(path)
    with pytest.raises(DataError, match="2048 pooled features, toy gives 5"):
        score(generated, other)
    np.savez(path, mu=np.ones(5), sigma=np.eye(5), mu_s=np.ones(63), sigma_s=np.eye(63))
    assert "63 spatial features, toy gives 28" in failure(path, toy)
    FeatureStatistics(real.pooled, real.spatial, real.probabilities, "mine", "inception-1-adm").save(path)
    assert "made with the extractor inception-1-adm, not toy" in failure(path, toy)
    with pytest.raises(DataError, match="of the extractor toy, mine of inception-1-adm"):
        score(generated, load_statistics(path))


def test_an_extractor_that_declares_no_sizes_is_checked_by_its_features(tmp_path, toy, colour_images):
    toy.__class__ = type("Undeclared", (type(toy),), {"feature_sizes": (None, None)})
    np.savez(tmp_path / "x.npz", mu=np.ones(64), sigma=np.eye(64), arr_0=colour_images)
    assert "64 pooled features, toy gives 5" in failure(tmp_path / "x.npz", toy)
