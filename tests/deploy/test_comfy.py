"""Files for ComfyUI, read back by a reader of their layout alone, and compared with numbers of its own package."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from ptq_exp.cli.export import main
from ptq_exp.deploy import sdnq_folder
from ptq_exp.deploy.comfy_file import write_comfy
from ptq_exp.errors import DataError
from ptq_exp.quantization import (
    Applied,
    Fitting,
    Policy,
    QRange,
    QuantSpec,
    Rule,
    TensorSpec,
    WeightQuantizer,
    Widths,
    applied_to,
    calibrate_,
    quantize_,
)
from ptq_exp.quantization.transforms.low_rank import LowRankBranch
from ptq_exp.quantization.transforms.rotate import Rotate
from ptq_exp.quantization.transforms.smooth import Smooth

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_FOLDER / "kit" / "int_layouts.npz")
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


def written(network: nn.Module, path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What `write_comfy` says, and the tensors of the file."""
    about = write_comfy(SimpleNamespace(network=network, model=SimpleNamespace(name="m", digest="d")), path)
    return about, load_file(path)


def blocks(size: int, channels: int) -> np.ndarray:
    """The block diagonal matrix that turns `channels` in blocks of `size`."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, H4)
    return np.kron(np.eye(channels // size), matrix)


def read(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The plain weight of a layer, by the layout: integers times scales, turned back."""
    weight = tensors[f"{name}.weight"].astype(np.float64)
    if f"{name}.comfy_quant" not in tensors:
        return weight
    about = json.loads(tensors[f"{name}.comfy_quant"].tobytes())
    assert about.pop("format") == "int8_tensorwise" and tensors[f"{name}.weight"].dtype == np.int8
    assert tensors[f"{name}.weight_scale"].dtype == np.float32
    weight = weight * tensors[f"{name}.weight_scale"]
    if about.get("convrot"):
        assert tensors[f"{name}.weight_scale"].shape == (len(weight), 1)
        weight = weight @ blocks(about["convrot_groupsize"], weight.shape[1]).T
    return weight


def linear(weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None, group: int = 0) -> nn.Sequential:
    """A linear layer, turned in blocks of `group`, its weight quantized with given scales."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    network = nn.Sequential(layer).double().requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(weight))
    if bias is not None:
        layer.bias.copy_(torch.from_numpy(bias))
    if group:
        rotate = Rotate(group=group)
        rotate.apply_(network, {str(group): ("0",)}, {})
    network.float()
    layer.weight_quantizer = WeightQuantizer(8, symmetric=True, rows=scale.size)
    set_scale(layer.weight_quantizer, scale)
    layer.weight_quantizer.freeze(layer.weight)
    return network


def set_scale(quantizer: WeightQuantizer, scale: np.ndarray) -> None:
    """Give a symmetric quantizer of 8 bits these scales."""
    zero = torch.zeros(())
    quantizer.set_range(QRange(torch.tensor(scale).float().reshape(-1, 1), zero, zero - 128, zero + 127))


@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_integers_and_scales_are_those_of_its_own_package(tmp_path, kind):
    scale = GOLDEN[f"comfy_int8_{kind}/scale"]
    about, found = written(linear(GOLDEN["w"], scale), tmp_path / "file.safetensors")
    assert about == {"types": {"int8": 1}, "plain": {}}
    np.testing.assert_array_equal(found["0.weight"], GOLDEN[f"comfy_int8_{kind}/code"])
    np.testing.assert_array_equal(found["0.weight_scale"], scale)  # of the tensor a number alone, of rows [out, 1]
    assert found["0.weight_scale"].shape == scale.shape
    assert json.loads(found["0.comfy_quant"].tobytes()) == {"format": "int8_tensorwise"}


@pytest.mark.parametrize(("case", "group"), [("K128G64", 64), ("K96G16", 16)])
def test_rotated_layers_are_those_of_its_own_package(tmp_path, case, group):
    """The integers, and the product with inputs that are turned and quantized token by token."""
    w, x, bias, code, scale, y = (
        GOLDEN[f"convrot/{case}/{key}"] for key in ("w", "x", "b", "int8/w_code", "int8/w_scale", "int8/y")
    )
    _, found = written(linear(w, scale, bias, group), tmp_path / "file.safetensors")
    np.testing.assert_array_equal(found["0.weight"], code)
    about = json.loads(found["0.comfy_quant"].tobytes())
    assert about == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    turned = (x @ blocks(group, x.shape[1])).astype(np.float32)
    of_token = np.maximum(np.abs(turned).max(1, keepdims=True) / 127, 1e-30)
    product = np.round(turned / of_token).astype(np.int64) @ found["0.weight"].T.astype(np.int64)
    made = product * of_token * found["0.weight_scale"].T + found["0.bias"]
    np.testing.assert_allclose(made, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


class Net(nn.Module):
    """x [N, 16, 4, 4]: a convolution, layers that are rotated, one with a branch, one that nothing is done to."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide, self.narrow = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 48), nn.Linear(48, 12)
        self.norm, self.kept = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.kept(self.norm(self.narrow(torch.relu(self.wide(tokens)))))


def quantized(transforms, x, *, bits=8, rule=None, only="", **policy) -> nn.Module:
    """`Net` after `transforms` at sites with the layer `only`, by these rules after `rule`; inputs stay as they are."""
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    settings = {"weight_symmetric": True, "attention": False, "first": (), "last": ()}
    rules = [Rule("kept", None, "nothing"), *Policy(**settings | policy).rules(Widths(bits, 8))]
    rules = rules if rule is None else [rule, *rules]
    for transform in transforms:
        sites = {site: names for site, names in transform.find(net, (x[:1],)).items() if only in ("", *names)}
        fitted = transform.fit(net, sites, Fitting(lambda network: network(x), rules))
        applied_to(net, (x[:1],), Applied(transform, sites, fitted))
    quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    for module in net.modules():
        for name in ("input_quantizer", "output_quantizer"):
            if hasattr(module, name):
                setattr(module, name, nn.Identity())
    return net


TRANSFORMED = {
    "rotated": ((Rotate(group=16),), {}, {}),
    "branch": ((LowRankBranch(rank=2, iterations=1, skip=("narrow",)),), {}, {"wide": "low-rank branch of rank 2"}),
    "rotated branch": ((Rotate(group=16), LowRankBranch(rank=2, iterations=1, skip=("narrow",))), {},
                       {"wide": "low-rank branch of rank 2"}),
    "smoothed": ((Smooth(online=True), Rotate(group=16)), {"only": "wide"}, {"wide": "online smoothing"}),
    "five bits": ((), {"weight_symmetric": False, "bits": 5}, {}),
    "inputs alone": ((Rotate(group=16),), {"rule": Rule("wide", QuantSpec(input=TensorSpec(8)), "inputs")}, {}),
}


@pytest.mark.parametrize("case", TRANSFORMED)
def test_a_network_of_what_is_read_computes_the_same(tmp_path, case):
    transforms, settings, plain = TRANSFORMED[case]
    torch.manual_seed(1)
    x = torch.randn(2, 16, 4, 4)
    net = quantized(transforms, x, **settings)
    about, found = written(net, tmp_path / "file.safetensors")
    assert about["plain"].pop("conv") == "convolutions have no int8 weights there"
    assert about["plain"].keys() == plain.keys() and all(why in about["plain"][name] for name, why in plain.items())
    again = Net().eval()
    names = {key.removesuffix("_scale") for key in found if not key.endswith("comfy_quant")}
    assert names == dict(again.named_parameters()).keys()
    for name in names:
        layer, _, own = name.rpartition(".")
        value = read(found, layer) if own == "weight" else found[name]
        again.get_parameter(name).data = torch.from_numpy(value.astype(np.float32))
    torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"weight_symmetric": False}, "its integers are not all in -128..127"),
     ({"weight_granularity": "group", "group_size": 16}, "scales for groups of input channels"),
     ({"bits": "mxfp4"}, "its number format mxfp4 is none of integers")],
)
def test_a_network_without_int8_is_refused_by_name(tmp_path, settings, reason):
    net = quantized((), torch.randn(2, 16, 4, 4), **settings)
    with pytest.raises(DataError, match=rf"no weight for int8 \(.*{reason}.*quantization.weight_symmetric=true"):
        written(net, tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_saved_model_under_the_names_of_its_checkpoint(tmp_path, exported):
    said, model = exported("comfy", tmp_path / "file.safetensors")
    found = load_file(tmp_path / "file.safetensors")
    assert "26 int8" in said and "not quantized there: 25, convolutions have no int8 weights there" in said
    checkpoint = next((tmp_path / "model").rglob("*.safetensors"))
    names = {key for key in found if not key.endswith((".weight_scale", ".comfy_quant"))}
    assert names == load_file(checkpoint).keys()
    for name in (key.removesuffix(".comfy_quant") for key in found if key.endswith(".comfy_quant")):
        weight = model.network.unet.get_submodule(name).weight.numpy()
        np.testing.assert_array_equal(read(found, name).astype(np.float32), weight)


def test_without_the_package_of_a_format_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sdnq_folder, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs the package sdnq, .*pip install 'ptq-exp\[sdnq\]'"):
        main(["quantized=x", "format=sdnq", "out=y"])


def test_settings_of_execution_and_unknown_formats_are_refused():
    with pytest.raises(SystemExit, match="batch: a ComfyUI file holds weights alone"):
        main(["quantized=x", "format=comfy", "out=y", "batch=4"])
    with pytest.raises(SystemExit, match="format=comfyui: choose one of openvino, onnx, gguf, comfy, sdnq"):
        main(["quantized=x", "format=comfyui", "out=y"])
