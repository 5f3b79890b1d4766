"""InceptionV3 against torch-fidelity's own forward pass and metrics, clean-fid's resizing, and unusable weights."""

import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ptq_exp.errors import CheckpointError, ConfigError, DataError
from ptq_exp.evaluation import (
    InceptionExtractor,
    extract_features,
    frechet_distance_from_features,
    inception_score,
)

PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def images():
    """Seven images with coarse and fine structure, upscaled by the extractor."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (7, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (0.7 * coarse + 0.3 * rng.integers(0, 256, (7, 32, 32, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def library(inception_weights):
    """The library's network and what it gives: pooled, first channels of the map, logits."""
    network = FeatureExtractorInceptionV3(
        "library", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )

    def forward(x):
        maps = []
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: maps.append(args[2]))
        pooled, logits = network(x)
        hook.remove()
        return pooled.numpy(), maps[0][:, :7].numpy(), logits.numpy()

    return forward


@pytest.fixture(scope="module")
def adm(inception_weights):
    return InceptionExtractor(str(inception_weights))


@pytest.fixture(scope="module")
def features(adm, images):
    return extract_features(adm, images, batch_size=4)


def test_outputs_are_the_librarys(adm, library, images):
    ours, theirs = adm(images[:4]), library(torch.from_numpy(images[:4]).permute(0, 3, 1, 2))
    assert [output.shape for output in ours] == [(4, 2048), (4, 7, 17, 17), (4, 1008)]
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert theirs_.std() > 1e-2  # a signal got through the random network
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-5, atol=1e-5 * np.abs(theirs_).max())


def test_autocast_changes_nothing(adm, images):
    wanted = adm(images[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adm(images[:1])
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_features_are_those_of_the_extractor_with_the_channels_of_the_map_first(adm, features, images):
    pooled, maps, logits = adm(images[4:])
    np.testing.assert_allclose(features.pooled[4:], pooled, rtol=1e-4, atol=1e-4)
    assert features.spatial.shape == (7, 2023) and adm.feature_sizes == features.sizes
    np.testing.assert_allclose(features.spatial[4:, 17 * 17 : 2 * 17 * 17], maps[:, 1].reshape(3, -1), atol=1e-4)
    np.testing.assert_allclose(features.probabilities[4:], torch.tensor(logits).double().softmax(1), atol=1e-5)


def test_fid_and_inception_score_are_the_librarys(features):
    columns = features.pooled[:, :48]  # the library's eigenvalues of 2048 x 2048 take a quarter of a minute
    first, second = (fid_features_to_statistics(torch.from_numpy(part)) for part in (columns[:4], columns[3:]))
    fid = fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_from_features(columns[:4], columns[3:]) == pytest.approx(fid, rel=1e-4)
    logits = torch.from_numpy(features.probabilities).log()  # softmax(log p) = p
    score = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert score > 1.001
    assert inception_score(features.probabilities) == pytest.approx(score, rel=1e-6)


def test_clean_is_the_same_network_after_clean_fids_resizing(inception_weights, adm, library, images):
    clean = InceptionExtractor(str(inception_weights), resize="clean")
    resized = np.stack([build_resizer("clean")(image) for image in images[:2]])
    np.testing.assert_array_equal(clean._resize(images[:2], "cpu").permute(0, 2, 3, 1), resized)
    # at 299 x 299 both resizings are the identity
    large = np.round(resized[:1]).astype(np.uint8)
    theirs = library(torch.from_numpy(large).permute(0, 3, 1, 2))
    for ours_, theirs_ in zip(clean(large), theirs, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-5, atol=1e-5 * np.abs(theirs_).max())
    assert not np.allclose(clean(images[:1])[0], adm(images[:1])[0], rtol=1e-3)


def test_names_tell_weights_and_preprocessing(inception_weights, adm):
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()[:8]
    clean = InceptionExtractor(str(inception_weights), resize="clean")
    assert (adm.name, clean.name) == (f"inception-{digest}-adm", f"inception-{digest}-clean")
    assert "TensorFlow" in adm.preprocessing and "clean-fid" in clean.preprocessing


def test_grey_is_repeated_to_three_channels(adm, images):
    grey = images[:1, :, :, :1]
    for one, three in zip(adm(grey), adm(grey.repeat(3, axis=3)), strict=True):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 8, 8, 2), np.uint8), ((1, 8, 8, 3), np.float32), ((8, 8), np.uint8)])
def test_other_arrays_are_data_errors(adm, shape, dtype):
    with pytest.raises(DataError, match="images must be uint8"):
        adm(np.zeros(shape, dtype))


# ---- weights


def test_without_a_file_the_hub_cache_is_used(inception_weights, adm, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(inception_weights, tmp_path / "checkpoints" / PUBLISHED)
    assert InceptionExtractor().name == adm.name


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        assert 0 < socket.getdefaulttimeout() <= 60  # or a silent firewall would hang the run
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(CheckpointError) as caught:
        InceptionExtractor()
    message = str(caught.value)
    assert PUBLISHED in message and "evaluation.weights=PATH" in message and "name resolution" in message
    assert "\n" not in message and socket.getdefaulttimeout() is None


def failure(path):
    with pytest.raises(CheckpointError) as caught:
        InceptionExtractor(str(path))
    message = str(caught.value)
    assert f"evaluation.weights={path}" in message and PUBLISHED in message and "\n" not in message
    return message


def test_missing_truncated_and_html_files_are_named(inception_weights, tmp_path):
    assert "no such file" in failure(tmp_path / "missing.pth")
    path = tmp_path / "weights.pth"
    path.write_bytes(inception_weights.read_bytes()[:100_000])
    assert "damaged" in failure(path)
    path.write_text("<!DOCTYPE html><html>404</html>")
    assert "damaged, or no file of plain PyTorch weights" in failure(path)
    path.write_bytes(b"")
    assert "damaged" in failure(path)


def test_weights_of_another_network_name_the_first_differences(inception_weights, tmp_path):
    path, state = tmp_path / "weights.pth", torch.load(inception_weights)
    torch.save({"conv.weight": torch.ones(2)}, path)
    assert "Conv2d_1a_3x3.conv.weight" in failure(path)
    torch.save(state | {"fc.weight": torch.ones(1000, 2048)}, path)
    assert "size mismatch for fc.weight" in failure(path)
    torch.save({"state_dict": state}, path)
    assert "found state_dict, not tensors by name" in failure(path)


def test_a_file_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    torch.save({"conv.weight": Attack()}, tmp_path / "weights.pth")
    failure(tmp_path / "weights.pth")
    assert not (tmp_path / "harm").exists()


def test_other_settings_are_config_errors(inception_weights, monkeypatch):
    with pytest.raises(ConfigError, match="resize=bilinear: choose adm or clean"):
        InceptionExtractor(str(inception_weights), resize="bilinear")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda: no CUDA device"):
        InceptionExtractor(str(inception_weights), device="cuda")
