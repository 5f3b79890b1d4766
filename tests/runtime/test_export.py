"""Exported files: what engines make of them without ptq-exp, and what is said of them."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import ptq_exp
from ptq_exp.cli.main import main
from ptq_exp.deploy.export import Export
from ptq_exp.deploy.export_page import page
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_, select_row
from ptq_exp.runtime.export import export_network
from ptq_exp.runtime.export_onnx import SESSION

GOLDEN = Path(__file__).parents[1] / "golden"
WITHOUT = """
import sys
sys.modules["ptq_exp"] = sys.modules["torch"] = None  # as where they are not installed
exec(open("program.py").read())
"""


class Small(nn.Module):
    """A convolution and a linear layer between two ends of 16-bit inputs, conditioned on time and class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.time, self.label = nn.Linear(4, 16), nn.Embedding(5, 16)
        self.conv_out = nn.Conv2d(16, 3, 1)

    def forward(self, x, t, y):
        waves = torch.sin(t[:, None] * torch.tensor([0.001, 0.01, 0.1, 1.0]))
        h = self.conv_in(x) + (self.time(waves) + self.label(y))[:, :, None, None]
        return self.conv_out(self.middle(nn.functional.silu(h)))


@pytest.fixture(scope="module")
def small():
    """The calibrated network, with two bins of ranges, and a call of four samples."""
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    call = torch.randn(4, 3, 8, 8), torch.tensor([5.0, 300.0, 700.0, 951.0]), {"y": torch.tensor([0, 1, 2, 4])}
    rules = Policy(attention=False).rules(Widths(8, 8), 2)
    quantize_(network, rules, sample(call))

    def batches():
        for row, factor in ((0, 1.0), (1, 3.0)):
            select_row(network, row)
            yield (factor * call[0], *call[1:])

    calibrate_(network, "mse", batches())
    return network, call


def sample(call, n=1):
    return call[0][:n], call[1][:n], {"y": call[2]["y"][:n]}


def distance(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def by_openvino(file):
    network = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: network(inputs)["eps"]


def by_onnxruntime(file):
    options = onnxruntime.SessionOptions()
    for entry in SESSION.items():
        options.add_session_config_entry(*entry)
    session = onnxruntime.InferenceSession(file, options)
    return lambda inputs: session.run(["eps"], inputs)[0]


@pytest.mark.parametrize(
    ("file", "engines"), [("model.xml", [by_openvino]), ("model.onnx", [by_openvino, by_onnxruntime])]
)
def test_any_number_of_samples_and_the_row_of_ranges_are_inputs(file, engines, small, tmp_path):
    network, call = small
    select_row(network, 0)
    made = export_network(network, sample(call, 2), sample(call), tmp_path / file, any_batch=True)
    assert list(made.inputs) == ["x", "t", "y", "row"]
    assert made.shapes == {"x": ("batch", 3, 8, 8), "t": ("batch",), "y": ("batch",), "row": (1,),
                           "eps": ("batch", 3, 8, 8)}
    assert [layer.layer for layer in made.layers if layer.executed == "float" and layer.macs] == ["conv_in", "conv_out"]
    assert 0.8 < made.layers.int8_share < 0.9 and made.engine.startswith("openvino")
    run = [engine(tmp_path / file) for engine in engines]
    for n in (1, 4):
        for row in (0, 1):
            select_row(network, row)
            x, t, conditions = sample(call, n)
            wanted = network(x, t, **conditions).numpy()
            inputs = {"x": x.numpy(), "t": t.numpy(), "y": conditions["y"].numpy(), "row": np.array([row])}
            for engine in run:
                assert distance(engine(inputs), wanted) < 0.01
    if file.endswith("onnx"):
        nodes = onnx.load(tmp_path / file).graph.node
        kinds = {node.op_type for node in nodes}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds and not any(node.metadata_props for node in nodes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of attention and convolutions."""
    path = tmp_path_factory.mktemp("saved")
    zipfile.ZipFile(GOLDEN / "saved_model_1.zip").extractall(path)
    return path


@pytest.fixture(scope="module")
def exported(folder):
    """A function from a format to the folder of its export, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = folder / name
            Export(str(folder / "quantized"), name, str(made[name]), 2, str(folder / "model")).write()
        return made[name]

    return make


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_the_six_lines_of_the_page_run_without_ptq_exp(name, exported):
    out = exported(name)
    (program,) = re.findall(r"^```python\n(.*?)\n```$", (out / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert program.count("\n") == 5
    (out / "program.py").write_text(program)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", WITHOUT], cwd=out, capture_output=True, text=True, check=False
        )
    finally:
        (out / "program.py").unlink()
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) < 0.02


@pytest.fixture(scope="module")
def by_engine(folder):
    """The saved model executed by OpenVINO, and how."""
    quantized = ptq_exp.load_quantized(folder / "quantized", checkpoint=str(folder / "model"), runtime="openvino")
    return quantized, {layer.layer: (layer.executed, layer.reason) for layer in quantized.runtime.account()}


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_what_is_said_of_an_export(name, exported, by_engine):
    out, (quantized, executed) = exported(name), by_engine
    about = json.loads((out / "export.json").read_text())
    assert about["format"] == name and about["source"]["model"] == quantized.model.name
    assert [port["name"] for port in about["inputs"]] == ["x", "t"]
    assert about["inputs"][0]["shape"] == about["outputs"][0]["shape"] == [2, *quantized.model.sample_shape]
    assert about["sampler"]["timesteps"] == quantized.grid.timesteps.tolist() and about["sampler"]["rows"] is None
    assert max(about["error_to_simulation"].values()) < 0.02
    assert {layer["layer"]: (layer["executed"], layer["reason"]) for layer in about["layers"]} == executed
    example = np.load(out / "example.npz")
    with torch.no_grad():
        answer = quantized.network(torch.from_numpy(example["x"]), torch.from_numpy(example["t"]))
    assert np.array_equal(example["eps"], answer.numpy())


def test_a_schedule_of_widths_is_a_row_for_each_step(tmp_path):
    zipfile.ZipFile(GOLDEN / "saved_model_1_steps.zip").extractall(tmp_path)
    quantized = ptq_exp.load_quantized(tmp_path / "scheduled", checkpoint=str(tmp_path / "model"))
    widths = [quantized.widths[row] for row in quantized.rows]
    assert widths == list(quantized.schedule.activation) and len(set(widths)) == 2


def test_the_page_tells_of_rows_guidance_correction_and_processors():
    port = {"name": "x", "type": "float32", "shape": ["batch", 3, 8, 8]}
    about = {
        "format": "openvino", "file": "model.xml", "source": {"model": "digits", "bits": "w8a8"},
        "inputs": [port], "outputs": [port], "settings": {"INFERENCE_PRECISION_HINT": "f32"}, "int8_share": 0.5,
        "executed_by": "openvino", "error_to_simulation": {"openvino": 1e-6},
        "sampler": {"rows": [0, 1], "guidance_scale": 1.5, "corrected": True}, "probe": None,
    }
    text = page(about)
    assert "the input `row` of each step in `rows`" in text and "Any number of samples runs slower" in text
    assert "guidance of scale 1.5 and the correction of quantization noise" in text
    assert "8-bit sums saturate" in text and "8-bit sums saturate" not in page(
        about | {"probe": {"weights": "7bit", "sum_of_right_one": 1.0}}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "quantized is missing: give quantized=, PATH: a run folder, or its sub-folder quantized"),
        (["quantised=a"], "quantised: no such setting of export; did you mean 'quantized'?"),
        (["quantized=a", "quantized=b"], "quantized: give it one value, quantized=VALUE"),
        (["quantized=a", "format=tflite", "out=b"], "format=tflite: choose one of openvino, onnx"),
        (["quantized=a", "format=openvino", "out=b", "batch=0"],
         "batch=0: give a number of samples, 1 or more, or dynamic for any number"),
        (["quantized=a", "format=openvino", "out=b", "batch=many"],
         "batch=many: give a number of samples, 1 or more, or dynamic for any number"),
        (["quantized=a", "format=openvino", "out=b", "runtime.regrid=yes"],
         "runtime.regrid=yes: choose one of true, false"),
        (["quantized=a", "format=openvino", "out=b", "runtime.weights=6bit"],
         "runtime.weights=6bit: choose one of as_saved, 7bit"),
        (["quantized=a", "format=openvino", "out=."],
         "out=. holds other files: give a new folder, or that of an earlier export"),
        (["quantized=a", "format=openvino", "out=b"], "quantized=a holds no saved model, quantization.json is missing"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptq_exp", "export", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith(f"error: {message}") and "\n" not in str(end.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [("onnx", "onnxscript", "onnx"), ("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_without_its_libraries_a_format_names_the_extra(name, missing, extra, monkeypatch):
    from importlib.util import find_spec

    for module in ("export", "export_onnx"):
        monkeypatch.setattr(
            f"ptq_exp.runtime.{module}.find_spec", lambda wanted: None if wanted == missing else find_spec(wanted)
        )
    with pytest.raises(ConfigError, match=rf"^format={name} needs .*pip install 'ptq-exp\[{extra}\]'"):
        Export("a", name, "b")


def test_groups_of_input_channels_are_refused_by_the_setting_to_change(calibrated, tmp_path):
    network, x = calibrated(weight_bits=4, weight_granularity="group", group_size=8)
    with pytest.raises(ConfigError, match=r"^format=openvino: second has .*or runtime.regrid=true$"):
        export_network(network, (x, x, {}), (x[:1], x[:1], {}), tmp_path / "model.xml")
