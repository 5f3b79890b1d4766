"""results.json is standard JSON after every stage; samples.npz is what the ADM evaluator reads."""

import dataclasses
import enum
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.errors import DataError, PTQError
from ptq_exp.results.record import Results, read_samples, write_samples
from ptq_exp.storage.plain_json import read_json, to_plain, write_json


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Card:
    seed: int
    path: Path


def strict(path):
    """Parse as a reader without Python's NaN extension would."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_plain_values_of_every_kind():
    value = {
        "tuple": (1, np.int64(2), np.float32(0.5)),
        "array": np.array([[True, False]]),
        "tensor": torch.tensor([1.5, math.inf]),
        "scalar": torch.tensor(3),
        "card": Card(7, Path("a/b")),
        "enum": Color.RED,
        "set": {3, 1, 2},
        "none": None,
        "bool": True,
    }
    assert to_plain(value) == {
        "tuple": [1, 2, 0.5],
        "array": [[True, False]],
        "tensor": [1.5, "Infinity"],
        "scalar": 3,
        "card": {"seed": 7, "path": "a/b"},
        "enum": "red",
        "set": [1, 2, 3],
        "none": None,
        "bool": True,
    }
    assert type(to_plain(np.float64(1.0))) is float


def test_what_has_no_plain_form_is_named():
    with pytest.raises(PTQError, match=r"config\.model\[1\] is a object"):
        to_plain({"model": [1, object()]}, "config")
    with pytest.raises(PTQError, match=r"config\.steps has the key 3"):
        to_plain({"steps": {3: "x"}}, "config")


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2)  # no text like "NaN"
plain = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_json_round_trip_keeps_every_float(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, value)
    strict(path)
    assert repr(read_json(path)) == repr(value)


def test_unreadable_json_is_a_data_error(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(DataError, match="x.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match="missing.json"):
        read_json(tmp_path / "missing.json")


def test_every_stage_is_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "results.json"
    results = Results(path, name="ndtc_w8a8", seed=0, config={"bits": {"weight": 8}})
    assert strict(path)["status"] == "running" and strict(path)["config"]["bits"]["weight"] == 8
    results.update("calibration", timing={"calibration": 1.5})
    metrics = {"fid": np.float64(3.5), "psnr": math.inf}
    results.update("evaluation", timing={"evaluation": 2.0}, metrics=metrics)
    written = strict(path)
    assert written["stage"] == "evaluation"
    assert written["timing"] == {"calibration": 1.5, "evaluation": 2.0}
    assert written["metrics"] == {"fid": 3.5, "psnr": "Infinity"}
    results.finish()
    assert strict(path)["status"] == "finished" and read_json(path)["metrics"]["psnr"] == math.inf


def test_the_block_decides_the_status(tmp_path):
    with Results(tmp_path / "good.json") as results:
        results.update("sampling")
    assert strict(tmp_path / "good.json")["status"] == "finished"
    with pytest.raises(KeyboardInterrupt), Results(tmp_path / "bad.json") as results:
        results.update("sampling", metrics={"fid": 1.0})
        raise KeyboardInterrupt
    written = strict(tmp_path / "bad.json")
    assert (written["status"], written["stage"]) == ("interrupted", "sampling")
    assert written["error"] == "interrupted by SIGINT (Ctrl-C)"
    assert written["metrics"] == {"fid": 1.0}
    with pytest.raises(PTQError), Results(tmp_path / "bad.json"):
        raise PTQError("bits=1 is too few")
    assert strict(tmp_path / "bad.json")["error"] == "bits=1 is too few"


def test_a_value_that_cannot_be_written_leaves_the_last_stage(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path, name="x")
    with pytest.raises(PTQError, match=r"results\.json\.model is a"):
        results.update("bad", model=torch.nn.Linear(1, 1))
    assert strict(path) == {"status": "running", "stage": "start", "name": "x"}


def test_samples_are_in_the_layout_of_the_adm_evaluator(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    write_samples(tmp_path / "samples.npz", images, np.arange(5, dtype=np.int32))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert list(archive) == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], images) and archive["arr_1"].dtype == np.int64
    write_samples(tmp_path / "samples.npz", images)
    read, labels = read_samples(tmp_path / "samples.npz")
    assert np.array_equal(read, images) and labels is None


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1)), None, "float64"),
        (np.zeros((2, 4, 4), np.uint8), None, "shape"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), "each of 2 images"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "integer label"),
    ],
)
def test_wrong_samples_are_refused(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        write_samples(tmp_path / "samples.npz", images, labels)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_samples_file_is_a_data_error(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(DataError, match="samples.npz"):
        read_samples(tmp_path / "samples.npz")
