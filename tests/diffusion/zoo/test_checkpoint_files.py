"""Files are read without running anything in them, and every damaged one is reported in one line."""

import os
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from ptq_exp.diffusion.checkpoints import read_checkpoint
from ptq_exp.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found, expected=TENSORS):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def message(path):
    """The error's text: one line that starts with the setting and the file."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"model.checkpoint={path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3, "optimizer_states": [{"state": {}}]},
        {f"module.{key}": value for key, value in TENSORS.items()},
        {**TENSORS, "version": "1.0", "step": 7},
        [TENSORS, {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, 3, 100],
        [{"a.weight": torch.zeros(2, 3)}, {"state": {}}, 3, 100, TENSORS],
    ],
    ids=["plain", "state_dict", "data-parallel", "with numbers", "list without EMA", "list with EMA"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_containers(saved, content, zipped):
    assert same(read_checkpoint(saved(content, _use_new_zipfile_serialization=zipped)))


def test_the_averaged_weights_of_a_training_list_are_announced(saved, caplog):
    with caplog.at_level("INFO"):
        read_checkpoint(saved([TENSORS, {"state": {}}, 3, 100, TENSORS]))
    assert "EMA" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert same(read_checkpoint(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n  <html lang='en'>Log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"just some text, and more of it", "neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 and nothing more", "not a complete PyTorch file"),
        (b"\x80\x02}q", "not a complete PyTorch file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, expected):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert expected in message(path)


def test_missing_and_folder(tmp_path):
    assert "no such file" in message(tmp_path / "nothing.pt")
    assert "folder" in message(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated(saved, share, zipped):
    path = saved({"w": torch.randn(5000)}, _use_new_zipfile_serialization=zipped)
    content = open(path, "rb").read()
    with open(path, "wb") as stream:
        stream.write(content[: int(len(content) * share)])
    assert "not a complete PyTorch file" in message(path)


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(5000)}, path)
    path.write_bytes(path.read_bytes()[:9000])
    assert "not a complete safetensors file" in message(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], 7, {"state_dict": {}}])
def test_no_tensors(saved, content):
    assert "no tensors inside" in message(saved(content))


class Runs:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec], ids=lambda function: function.__name__)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(saved, tmp_path, function, zipped):
    marker = tmp_path / "executed"
    command = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    path = saved({**TENSORS, "payload": Runs(function, command)}, _use_new_zipfile_serialization=zipped)
    text = message(path)
    assert not marker.exists()
    assert function.__name__ in text and "nothing of it was executed" in text and "safetensors" in text


def test_classes_of_callbacks_are_replaced_by_empty_ones(saved, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    calls = []
    callback = type("ModelCheckpoint", (), {"__module__": name, "__init__": lambda self: calls.append(self)})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, name, types.SimpleNamespace(ModelCheckpoint=callback))
        states = {callback: {"best_model_score": torch.tensor(0.1)}, "instance": callback()}
        calls.clear()
        path = saved({"callbacks": states, "state_dict": TENSORS})
    assert same(read_checkpoint(path)) and calls == []


def test_other_classes_are_named(saved, monkeypatch):
    other = type("Trainer", (), {"__module__": "foreign.training"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "foreign", types.ModuleType("foreign"))
        patch.setitem(sys.modules, "foreign.training", types.SimpleNamespace(Trainer=other))
        path = saved({"trainer": other, "state_dict": TENSORS})
    assert "foreign.training.Trainer" in message(path)
