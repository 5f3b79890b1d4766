"""A stage finds its artefact or computes it, resumes, cleans up, and says which; keys have versions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptq_exp.experiment import keys as keys_module
from ptq_exp.experiment.keys import VERSIONS, Keys, joined, versioned
from ptq_exp.experiment.stage import Made, Record, Stages, cached, resumable, working_folder
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.storage.cache import ArtifactCache

KEY = {"seed": 0}


def test_it_is_computed_once_and_says_which(tmp_path, caplog):
    caplog.set_level("INFO", "ptq_exp")
    changed, folders = [], []

    def make(folder):
        folder.mkdir(parents=True)
        (folder / "piece").touch()
        folders.append(folder)
        return {"x": np.arange(3)}

    for _ in range(2):
        found = cached(ArtifactCache(tmp_path), "ranges", KEY, make, "ranges", when_reused=changed.append,
                       detail=lambda arrays: f", {len(arrays['x'])} numbers")
        assert found["x"].tolist() == [0, 1, 2]
    said = [record.getMessage() for record in caplog.records if record.name == "ptq_exp"]
    assert said == ["ranges: computed, 3 numbers", "ranges: reused from the cache, 3 numbers"]
    assert len(folders) == len(changed) == 1 and not folders[0].exists()
    assert list((tmp_path / "parts").iterdir()) == []


@pytest.mark.parametrize("mode", ["on", "off"])
def test_what_was_done_before_an_error_is_there_for_the_next(tmp_path, mode):
    def make(folder):
        if (folder / "piece").exists():
            return {"x": np.ones(1)}
        folder.mkdir(parents=True)
        (folder / "piece").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(ArtifactCache(tmp_path, mode), "noise", KEY, make, "noise")
    assert cached(ArtifactCache(tmp_path, mode), "noise", KEY, make, "noise")["x"].tolist() == [1]
    for fails in (True, False):
        try:
            with resumable(ArtifactCache(tmp_path, mode), "images", KEY) as folder:
                folder.mkdir(parents=True, exist_ok=True)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert folder.exists()
    assert not folder.exists()


def test_without_a_cache_nobody_else_looks_into_the_folder(tmp_path):
    on, off = (working_folder(ArtifactCache(tmp_path, mode), "noise", KEY) for mode in ("on", "off"))
    assert on != off and on.parent == off.parent == tmp_path / "parts"


def test_stages_are_timed_and_their_records_written(tmp_path):
    written = []

    class Writer:
        def write(self, stage, record, **numbers):
            written.append((stage, dict(record.numbers), sorted(numbers)))

    stage = Stages(ArtifactCache(tmp_path), Writer())
    assert stage("plain", lambda: 7) == 7
    assert stage("recorded", lambda a, b=0: Made(a + b, Record({"sum": a + b})), 1, b=2) == 3
    assert written == [("plain", {}, ["cache", "seconds"]), ("recorded", {"sum": 3}, ["cache", "seconds"])]


@pytest.fixture
def keys():
    config = ExperimentConfig()
    config.bits.weight, config.bits.activation, config.reconstruction.granularity = 4, 8, "block"
    grid = SimpleNamespace(timesteps=torch.arange(2), alphas_cumprod=torch.ones(2), eta=0.0, solver="ddim")
    return Keys(config, SimpleNamespace(digest="d", blocks=(), drawing={}), grid, 1.0)


def test_another_version_of_a_kind_changes_what_is_made_of_it_and_nothing_else(keys, monkeypatch):
    def all_keys():
        return {"images": keys.images(), "calibration": keys.calibration(1), "ranges": keys.ranges(),
                "quantization": keys.quantization(), "estimates": keys.estimates(None, True)}

    before = all_keys()
    changes = {
        "sampling": {"images", "calibration", "ranges", "quantization", "estimates"}, "images": {"images"},
        "calibration": {"calibration", "ranges", "quantization", "estimates"},
        "ranges": {"ranges", "quantization", "estimates"}, "reconstruction": {"quantization", "estimates"},
        "correction": {"estimates"}, "reference": set(),
    }
    for kind, names in changes.items():
        monkeypatch.setitem(keys_module.VERSIONS, kind, VERSIONS[kind] + 1)
        after = all_keys()
        assert {name for name in before if before[name] != after[name]} == names, kind
        monkeypatch.setitem(keys_module.VERSIONS, kind, VERSIONS[kind] - 1)
    assert all_keys() == before


def test_what_was_made_of_rounded_weights_is_not_taken_for_what_float64_gives(keys):
    """Folders in float64 were once read by way of float32; all other types were, and are, read as they are."""
    keys.config.model.dtype = "float64"
    for key in (keys.images(), keys.calibration(1), keys.ranges(), keys.quantization(), keys.estimates(None, True)):
        assert key["versions"]["float64"] == VERSIONS["float64"]
    for dtype in ("float32", "bfloat16", "float16"):
        keys.config.model.dtype = dtype
        assert keys.images()["versions"] == {"sampling": 1, "images": 1}


def test_the_version_of_the_package_is_in_no_key(keys, monkeypatch):
    before = keys.estimates(None, True)
    monkeypatch.setattr("ptq_exp.__version__", "99")
    assert keys.estimates(None, True) == before


def test_joined_keys_have_all_versions():
    one, other = versioned("images", {"a": 1}), versioned("noise", {"b": 2})
    assert joined(one, other) == {"a": 1, "b": 2, "versions": {"images": 1, "noise": 1}}
    assert joined({"c": 3}) == {"c": 3, "versions": {}}
