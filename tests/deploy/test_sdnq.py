"""Folders for sdnq, loaded by diffusers with the package itself: weights by its own arithmetic, and images."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from small_pipelines import SMALL
from torch import nn

from ptq_exp.deploy.integer_weights import plain_weight
from ptq_exp.deploy.sdnq_folder import write_sdnq
from ptq_exp.deploy.sdnq_layer import sdnq_layer
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization import (
    ActivationQuantizer,
    Applied,
    Fitting,
    PerChannel,
    PerTensor,
    Policy,
    QRange,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    WeightQuantizer,
    Widths,
    applied_to,
    calibrate_,
    quantize_,
)
from ptq_exp.quantization.packed_network import packed_layers
from ptq_exp.quantization.transforms.low_rank import LowRankBranch
from ptq_exp.quantization.transforms.rotate import Rotate
from ptq_exp.quantization.transforms.smooth import Smooth

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # to be set before it is imported; compiling takes a minute
sdnq = pytest.importorskip("sdnq", reason="the package sdnq is not installed: pip install 'ptq-exp[sdnq]'")
GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_FOLDER / "kit" / "int_layouts.npz")
X = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(ModelMixin, ConfigMixin):
    """x [N, 16, 4, 4]: convolutions of three kinds, linear layers, a table, as a model of diffusers."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.shortcut, self.wide, self.narrow = nn.Conv2d(32, 16, 1), nn.Linear(16, 48), nn.Linear(48, 7)
        self.table, self.norm, self.kept = nn.Embedding(16, 16), nn.LayerNorm(7), nn.Linear(7, 5)

    def forward(self, x):
        y = self.shortcut(self.depthwise(torch.relu(self.conv(x)))).flatten(2).transpose(1, 2) + self.table.weight
        return self.kept(self.norm(self.narrow(torch.relu(self.wide(y)))))


def quantized(transforms=(), bits=4, rules=(), dtype=torch.float32, **policy) -> SimpleNamespace:
    """`Net` after `transforms`, weights quantized by these rules, and `kept` not at all."""
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    net = net if dtype == torch.float32 else net.to(dtype)
    settings = {"attention": False, "first": (), "last": ()}
    rules = [*rules, Rule("kept", None, "a test"), *Policy(**settings | policy).rules(Widths(bits, 8))]
    return made_of(net, rules, X.to(dtype), transforms)


def made_of(net, rules, x, transforms=()) -> SimpleNamespace:
    """A network quantized in place after `transforms`."""
    for transform in transforms:
        sites = transform.find(net, (x[:1],))
        fitted = transform.fit(net, sites, Fitting(lambda network: network(x), rules))
        applied_to(net, (x[:1],), Applied(transform, sites, fitted))
    quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    return exported(net, rules, SimpleNamespace(name="m", digest="d"))


def exported(net, rules, model) -> SimpleNamespace:
    """What of a quantized model is exported; its activations are not quantized any more."""
    for module in net.modules():
        for name in [name for name, child in module.named_children() if isinstance(child, ActivationQuantizer)]:
            setattr(module, name, nn.Identity())
    return SimpleNamespace(network=net, model=model, rules=rules, schedule=None, statistics=None)


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of loaded layers, as sdnq's own arithmetic has them."""
    return {
        name: module.sdnq_dequantizer(**{key: getattr(module, key, None) for key in sdnq.common.sdnq_keys})
        for name, module in network.named_modules() if hasattr(module, "sdnq_dequantizer")
    }


def of_layer(name: str, bits, *segments: int) -> Rule:
    """Quantize one weight symmetrically, with a scale for each of these segments of input channels, or each channel."""
    granularity = Segments(segments, PerTensor()) if segments else PerChannel()
    return Rule(name, QuantSpec(weight=TensorSpec(bits, symmetric=True, granularity=granularity)), "a test")


SYMMETRIC = {"weight_symmetric": True}
GROUPS = SYMMETRIC | {"weight_granularity": "group"}
BRANCH = LowRankBranch(rank=3, iterations=2)
FEW = "groups of 4 input channels are fewer than 8"
CASES = {  # settings, number of weights of each type, {layer: why it is plain}, {layer: settings that sdnq has for it}
    "int8": (SYMMETRIC | {"bits": 8}, {"int8": 5}, {}, {"wide": {"weights_dtype": "int8", "group_size": -1}}),
    "int4": (SYMMETRIC, {"int4": 5}, {}, {"wide": {"weights_dtype": "int4", "group_size": -1}}),
    "int3": (SYMMETRIC | {"bits": 3}, {"int3": 5}, {}, {}),
    "uint8": ({"bits": 8}, {"uint8": 5}, {}, {}),
    "uint4": ({}, {"uint4": 5}, {}, {}),
    "an odd number": (SYMMETRIC | {"rules": (of_layer("kept", 4),)}, {"int4": 5, "int8": 1}, {}, {}),
    "per tensor": (SYMMETRIC | {"weight_granularity": "tensor"}, {"int4": 5}, {}, {}),
    "groups": (GROUPS | {"group_size": 8}, {"int4": 3, "uint4": 2}, {}, {"conv": {"group_size": 8}}),
    "uneven groups": (GROUPS | {"group_size": 20}, {"int4": 3, "float32": 2}, {"shortcut": FEW, "narrow": FEW}, {}),
    "segments": (SYMMETRIC | {"rules": (of_layer("narrow", 4, 16, 32),)}, {"int4": 5}, {},
                 {"narrow": {"group_size": 16}, "wide": {"group_size": -1}}),
    "blocks": (SYMMETRIC | {"rules": (of_layer("wide", "nvfp4"),)}, {"int4": 4, "float32": 1},
               {"wide": "its number format nvfp4 is none of integers"}, {}),
    "rotated": (SYMMETRIC | {"transforms": (Rotate(group=16),)}, {"int4": 4, "float32": 1},
                {"conv": "online rotation in blocks of 16 of channels before a kernel of 3x3"},
                {"shortcut": {"use_hadamard": True, "hadamard_group_size": 16}, "depthwise": {"use_hadamard": False}}),
    "branch": (SYMMETRIC | {"transforms": (LowRankBranch(rank=3, iterations=2, conv3x3=True),)}, {"int4": 5}, {},
               {"conv": {"use_svd": True, "svd_rank": 3}, "depthwise": {"use_svd": False}}),
    "rotated branch": (SYMMETRIC | {"transforms": (Rotate(group=16, skip=("conv",)), BRANCH)}, {"int4": 5}, {},
                       {"wide": {"use_svd": True, "use_hadamard": True}, "conv": {"use_svd": False}}),
    "smoothed": (SYMMETRIC | {"transforms": (Smooth(online=True),)}, {"int4": 2, "float32": 3},
                 dict.fromkeys(("conv", "wide", "narrow"), "its input goes through online smoothing"), {}),
}
EXACT = {"int8", "int4", "int3", "an odd number", "per tensor", "uneven groups", "segments", "blocks", "smoothed"}
"""Signed integers alone, whose products with scales are rounded once: the same bits."""


@pytest.mark.parametrize("case", CASES)
def test_weights_are_read_as_they_are(tmp_path, case):
    settings, types, plain, expected = CASES[case]
    model = quantized(**settings)
    about = write_sdnq(model, tmp_path / "out")
    assert about["types"] == types and about["plain"] == plain
    loaded = Net.from_pretrained(tmp_path / "out")
    found = weights_of(loaded)
    assert found.keys() == about["distance"].keys()
    for key, layer in packed_layers(model.network):
        name, wanted = key.removesuffix(".weight"), plain_weight(layer)
        read = found.get(name, loaded.get_submodule(name).weight)
        if case in EXACT or name in plain:
            assert torch.equal(read, wanted.float())
        else:  # sums of float32: a few units of its last place, at the largest weight
            assert read.dtype == torch.float32 and (read - wanted).abs().max() <= 2**-21 * wanted.abs().max()
            assert about["distance"][name] < 2**-21
    for name, entries in expected.items():
        layer = loaded.get_submodule(name)
        assert entries.items() <= (vars(layer.sdnq_dequantizer) | {"use_svd": layer.svd_up is not None}).items()
    torch.testing.assert_close(loaded(X), model.network(X), rtol=1e-5, atol=2e-6)


def test_a_network_in_16_bits_keeps_its_scales_in_32(tmp_path):
    """Bit for bit by sdnq's own loader; that of diffusers rounds scales to the type it is asked for."""
    model = quantized(bits=8, dtype=torch.bfloat16, **SYMMETRIC)
    about = write_sdnq(model, tmp_path / "out")
    assert about["dtype"] == "bfloat16" and set(about["distance"].values()) == {0}
    own = sdnq.load_sdnq_model(str(tmp_path / "out"), Net, dtype=torch.bfloat16)
    rounded = weights_of(Net.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16))
    for name, read in weights_of(own).items():
        wanted = model.network.get_submodule(name).weight
        assert read.dtype == torch.bfloat16 and torch.equal(read, wanted)
        torch.testing.assert_close(rounded[name], wanted, rtol=2**-7, atol=0)
    assert torch.equal(own(X.bfloat16()), model.network(X.bfloat16()))
    assert 'sdnq.load_sdnq_model("FOLDER", dtype=torch.bfloat16)' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("key", "bits", "group"), [("sdnq_int8_row", 8, 256), ("sdnq_int/b4g64", 4, 64)])
def test_integers_and_scales_are_those_of_the_package(key, bits, group):
    code, scale = GOLDEN[f"{key}/code"], torch.from_numpy(GOLDEN[f"{key}/scale"]).clamp(min=1e-30)  # of rows of zeros
    layer = nn.Linear(256, 12).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(GOLDEN["w"]))
    layer.weight_quantizer = WeightQuantizer(bits, symmetric=True, rows=12, segments=(group,) * (256 // group))
    zero, most = torch.zeros(()), 1 << bits - 1
    layer.weight_quantizer.set_range(QRange(scale, zero, zero - most, zero + most - 1))
    layer.weight_quantizer.freeze(layer.weight)
    made = sdnq_layer(layer)
    assert made.distance == 0 and torch.equal(made.tensors["scale"].view(scale.shape), scale)
    found = made.tensors["weight"]
    if bits == 4:
        found = sdnq.packed_int.unpack_int(found, "int4", (12, 256))
        np.testing.assert_array_equal(layer.weight.numpy(), GOLDEN[f"{key}/dequant"])
    np.testing.assert_array_equal(found.numpy(), code)


def test_a_pipeline_draws_the_same_images(tmp_path):
    small = SMALL["ddim"]
    model = PipelineModel(small.build(), small.requests, steps=2, call=small.call, name="small")
    net, example = model.copy_denoiser(), model.example_inputs()
    rules = Policy(first=("*conv_in",), last=("*conv_out",), attention=False).rules(Widths(4, 8))
    quantize_(net, rules, example)
    calibrate_(net, "minmax", [example])
    made = exported(net, rules, model)
    about = write_sdnq(made, tmp_path / "out")
    assert about["types"].keys() == {"uint4", "uint8"} and about["left_out"] == ["the ranges of activations"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    drawn, expected, first = (
        np.asarray(pipe(**model.arguments([0, 1], 7)).images)
        for pipe in (loaded, model.pipeline_with(net.component), model.pipeline)
    )
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert np.abs(expected - first).max() > 1e-3
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'pipe = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.float32)' in text


def test_the_command_writes_a_saved_model(tmp_path, exported):
    said, model = exported("sdnq", tmp_path / "out")
    assert "tensors: 2 uint8, 47 uint4, 2 int4" in said and "relative distance from the quantized weights:" in said
    found = weights_of(UNet2DModel.from_pretrained(tmp_path / "out"))
    for key, layer in packed_layers(model.network.unet):
        torch.testing.assert_close(found[key.removesuffix(".weight")], layer.weight, rtol=1e-6, atol=1e-7)


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    write_sdnq(quantized(), out)
    assert write_sdnq(quantized(bits=8), out)["types"] == {"uint8": 5}
    assert json.loads((out / "export.json").read_text())["types"] == {"uint8": 5}
    (out / "mine.txt").touch()
    with pytest.raises(ConfigError, match="out holds other files: give a new folder"):
        write_sdnq(quantized(), out)
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and (out / "mine.txt").exists()


def test_what_it_cannot_be_written_of_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(16, 8)).requires_grad_(False)
    rules = Policy(attention=False, first=(), last=()).rules(Widths(4, 8))
    with pytest.raises(ConfigError, match="no model of diffusers alone.*format=gguf or format=comfy"):
        write_sdnq(made_of(net, rules, X[0, 0].new_zeros(2, 16)), tmp_path / "out")
    with pytest.raises(DataError, match="its number format mxfp4 is none of integers.*integers of 8 bits or fewer"):
        write_sdnq(quantized(bits="mxfp4"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
