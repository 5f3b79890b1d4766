"""GGUF files, read back with the format's own reader and compared with bytes of ggml."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.cli.export import main
from ptq_exp.errors import DataError
from ptq_exp.quantization import Policy, WeightQuantizer, Widths, calibrate_, quantize_
from ptq_exp.quantization.transforms.rotate import Rotate

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'ptq-exp[gguf]'")
from ptq_exp.deploy import gguf_file  # noqa: E402
from ptq_exp.deploy.gguf_file import write_gguf  # noqa: E402

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "kit" / "gguf.npz")


def written(network: nn.Module, path: Path) -> tuple[dict, dict]:
    """What `write_gguf` says, and the tensors of the file by name as its own reader has them."""
    about = write_gguf(SimpleNamespace(network=network, model=SimpleNamespace(name="m", digest="d")), path)
    return about, {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def values(tensor) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric"), [("q8_0", 8, True), ("q8_0", 6, False), ("q4_0", 4, True), ("q4_0", 3, True),
                                    ("q4_1", 4, False), ("q5_0", 5, True)],
)
def test_blocks_are_those_of_ggml(tmp_path, kind, bits, symmetric):
    layer = nn.Linear(512, 18)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(GOLDEN["x"]))
    layer.weight_quantizer = WeightQuantizer(bits, symmetric=symmetric)
    about, found = written(nn.Sequential(layer), tmp_path / "file.gguf")
    assert about["types"] == {kind.upper(): 1, "F32": 1}
    assert found["0.weight"].tensor_type.name == kind.upper()
    np.testing.assert_array_equal(np.asarray(found["0.weight"].data).view(np.uint8).reshape(18, -1),
                                  GOLDEN[f"{kind}/bytes"])
    np.testing.assert_array_equal(values(found["0.weight"]).reshape(18, 512), GOLDEN[f"{kind}/dequant"])
    np.testing.assert_array_equal(values(found["0.bias"]), layer.bias.detach().numpy())


def test_a_quantized_network_is_read_back(tmp_path):
    """Linear layers in blocks, 3x3 convolutions and all other parameters in floating point."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 16, 32), nn.Linear(32, 5)
    )
    rules = Policy(first=("0",), last=("4",), attention=False).rules(Widths(4, 8))
    x = torch.randn(2, 3, 6, 6)
    quantize_(network, rules, (x[:1],))
    calibrate_(network, "minmax", [(x,)])
    about, found = written(network, tmp_path / "file.gguf")
    assert about["types"] == {"F16": 1, "F32": 5, "Q4_1": 1, "Q8_0": 1}
    parameters = {name: p.detach().numpy() for name, p in network.named_parameters()}
    assert set(found) == set(parameters)
    for name, wanted in parameters.items():
        read = values(found[name]).reshape(wanted.shape)
        distance = np.linalg.norm(read - wanted) / max(np.linalg.norm(wanted), 1e-30)
        assert distance == pytest.approx(about["distance"].get(name, 0), abs=1e-7)
    limits = {"0.weight": 5e-4, "3.weight": 0.09, "4.weight": 6e-3}
    assert set(about["distance"]) == set(limits)
    assert all(about["distance"][name] < limit for name, limit in limits.items())
    fields = gguf.GGUFReader(str(tmp_path / "file.gguf")).fields
    assert bytes(fields["general.architecture"].parts[-1]) == b"ptq-exp"


def test_what_a_transform_does_at_run_time_is_put_into_the_weights(tmp_path):
    """A reader knows no rotation: the file has to hold the weight that does without."""
    torch.manual_seed(0)
    network, rotate = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False), Rotate(group=16)
    before = network[0].weight.clone()
    rotate.apply_(network, {"16": ("0",)}, {})
    network[0].weight_quantizer = WeightQuantizer(8, symmetric=True)
    assert (network[0].weight - before).norm() > before.norm() / 2
    about, found = written(network, tmp_path / "file.gguf")
    assert about["distance"]["0.weight"] < 6e-3
    np.testing.assert_allclose(values(found["0.weight"]).reshape(32, 64), before.numpy(), atol=1e-3)


def test_a_network_without_quantized_weights_is_refused(tmp_path):
    with pytest.raises(DataError, match="no quantized weight"):
        written(nn.Sequential(nn.Linear(4, 4)), tmp_path / "file.gguf")
    assert not (tmp_path / "file.gguf").exists()


def test_without_the_package_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs the package gguf, .*pip install 'ptq-exp\[gguf\]'"):
        main(["quantized=x", "format=gguf", "out=y"])


def test_settings_of_execution_are_refused(capsys):
    with pytest.raises(SystemExit, match="batch: a GGUF file holds weights alone"):
        main(["quantized=x", "format=gguf", "out=y", "batch=4"])
