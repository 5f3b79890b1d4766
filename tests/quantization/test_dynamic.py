"""Activation ranges that follow the data: golden codes, edge cases, and networks that have them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    DynamicQuantizer,
    Policy,
    QuantSpec,
    TensorSpec,
    Widths,
    calibrate_,
    disabled,
    load_quantized_,
    proven,
    quantize_,
    quantizers,
    refuted,
    save_quantized,
)
from ptq_exp.quantization.formats import FORMATS
from ptq_exp.runtime.plan import integer_plan

TINY = torch.finfo(torch.float32).tiny
SUBNORMAL = 5
"""Row of the golden input whose scale no float32 holds."""


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "kit" / "dynamic.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def codes(quantizer, x):
    """Integers, counted from 0 of an asymmetric range."""
    cells = quantizer.cells(x)
    return (quantizer(x) / cells.scale).round() + cells.zero_point


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "share"), [("row", "token"), ("group32", 32), ("group64", 64), ("tensor", "tensor")])
def test_symmetric_codes_are_golden(golden, bits, name, share):
    x = golden["x"][None]  # one sample
    quantizer = DynamicQuantizer(bits, share=share, symmetric=True)
    wanted = golden[f"int{bits}_{name}/code"].float()
    rows = [row for row in range(14) if row != SUBNORMAL]
    assert torch.equal(codes(quantizer, x)[0, rows], wanted[rows])
    scale = quantizer.cells(x).scale.expand(1, 14, 128)[0, rows]
    expected = golden[f"int{bits}_{name}/scale"].double()
    expected = expected.reshape(1, 1) if share == "tensor" else expected
    expected = expected.repeat_interleave(128 // expected.shape[-1], -1).expand(14, 128)[rows]
    live = expected > 0
    torch.testing.assert_close(scale[live].double(), expected[live], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_asymmetric_codes_are_golden(golden, bits):
    x, quantizer = golden["x"], DynamicQuantizer(bits, share="token")
    rows = [row for row in range(1, 14) if row != SUBNORMAL]  # row 0, all zeros, has any zero point
    assert torch.equal(codes(quantizer, x)[rows], golden[f"uint{bits}_row/code"].float()[rows])
    assert torch.equal(quantizer.cells(x).zero_point[rows, 0], golden[f"uint{bits}_row/zero"].float()[rows])
    # the integer product, with the zero point taken out of the sum
    weight = golden[f"uint{bits}_row/w_code"].double() * golden[f"uint{bits}_row/w_scale"][:, None]
    product = quantizer(x).double() @ weight.T
    torch.testing.assert_close(product[7:], golden[f"uint{bits}_row/y_rows7"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "share"), [("row", "token"), ("group64", 64)])
def test_fp8_codes_are_golden(golden, name, share):
    x, quantizer = golden["x"], DynamicQuantizer("fp8_e4m3fn", share=share)
    values = torch.as_tensor(FORMATS["fp8_e4m3fn"].values).float()[golden[f"spec_fp8_{name}/code"].long()]
    rows = [row for row in range(14) if row != SUBNORMAL]
    found = (quantizer(x) / quantizer.cells(x).scale)[rows]
    torch.testing.assert_close(found, values[rows], rtol=1e-6, atol=0)


EVERY = pytest.mark.parametrize("settings", [
    {"share": "token"}, {"share": 3}, {"share": "token", "symmetric": True}, {"share": 5, "symmetric": True},
    {"share": "tensor"}, {"share": "tensor", "symmetric": True}, {"bits": "fp8_e4m3fn", "share": "token"},
], ids=str)


@EVERY
def test_edge_cases(settings):
    quantizer = DynamicQuantizer(**{"bits": 8} | settings)
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 8, generator=draw)
    for row in (torch.zeros(1, 8), -torch.zeros(1, 8), torch.full((1, 8), 1e-40), torch.full((1, 8), -3e38),
                torch.tensor([[3e38, -3e38, 0, 0, 1, -1, 1e-30, 0]])):
        y = quantizer(torch.cat([row, plain]))
        assert bool(y.isfinite().all()) and torch.equal(y[1:], quantizer(plain))
        error = (y[:1] - row).abs()
        assert float(error.max()) <= max(0.07 * float(row.abs().max()), TINY)
        assert bool((y[:1][row == 0] == 0).all())  # zero is a level
    for poison in (torch.nan, torch.inf):
        y = quantizer(torch.cat([torch.full((1, 8), poison), plain]))
        assert not bool(y[0].isfinite().any()) and torch.equal(y[1:], quantizer(plain))
    assert quantizer(plain[:0]).shape == (0, 8) and quantizer(torch.zeros(2, 0)).shape == (2, 0)
    assert quantizer.off_grid(quantizer(plain)) == 0
    assert torch.equal(quantizer(plain[0]), quantizer(plain)[0])  # without samples


@EVERY
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bit_types(settings, kind):
    """Codes stay within their range, where a rounded quotient could reach 128."""
    quantizer = DynamicQuantizer(**{"bits": 8} | settings)
    x = torch.randn(300, 15, generator=torch.Generator().manual_seed(0)).to(kind)
    y = quantizer(x)
    assert y.dtype == kind and torch.equal(y, quantizer(x.float()).to(kind))
    assert quantizer.cells(x).scale.dtype == torch.float32
    assert float(y.abs().max()) <= float(x.abs().max()) * (1 + 2**-7)
    assert quantizer.returned_off_grid(x, y) == 0
    assert quantizer.returned_off_grid(x, y + (torch.arange(15) == 3) * 0.0371) > 200


def test_gradients_pass_straight_through_and_dropped_elements_stay():
    quantizer = DynamicQuantizer(8, share="token")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    quantizer.kept = lambda x: torch.ones_like(x)
    assert torch.equal(quantizer(x), x)


class Products(nn.Module):
    """Multiplies activations itself."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, tokens):
        return nn.functional.scaled_dot_product_attention(self.q(tokens), tokens, tokens)


class Net(nn.Module):
    """Convolutions, attention of `diffusers`, and products of an own kind."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.attention = Attention(8, heads=2, dim_head=4)
        self.own, self.conv_out = Products(), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        h = self.norm(self.conv_in(x))
        tokens = h.flatten(2).mT
        tokens = tokens + self.attention(tokens)
        return self.conv_out(self.own(tokens).mT.reshape(h.shape))


EXAMPLE = (torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)),)


def network(activation, kind=torch.float32, **policy):
    torch.manual_seed(0)
    full = Net().eval().requires_grad_(False).to(kind)
    example = (EXAMPLE[0].to(kind),)
    made = copy.deepcopy(full)
    rules = Policy(activation=activation, **policy).rules(Widths(8, 8))
    report = quantize_(made, rules, example)
    calibrate_(made, "minmax", [] if activation != "static" else [example])
    return full, made, rules, report


@pytest.fixture
def states():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", ["dynamic_tensor", "dynamic_token", "dynamic_group"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_networks_need_no_data_and_images_do_not_depend_on_their_batch(activation, symmetric, states):
    full, made, _, report = network(activation, activation_group_size=3, activation_symmetric=symmetric)
    y = made(states)
    assert 0 < float((y - full(states)).norm() / full(states).norm()) < 0.05
    for number, state in enumerate(states):
        torch.testing.assert_close(made(state[None]), y[number : number + 1], rtol=1e-5, atol=1e-5)
    far = torch.cat([states[:1], 1e4 * states[1:]])
    torch.testing.assert_close(made(far)[:1], y[:1], rtol=1e-5, atol=1e-5)
    poisoned = torch.cat([states[:1], states[1:] * torch.nan])
    torch.testing.assert_close(made(poisoned)[:1], y[:1], rtol=1e-5, atol=1e-5)
    with disabled(made):
        assert torch.equal(made.norm(made.conv_in(states)), made.norm(nn.Conv2d.forward(made.conv_in, states)))
    activations = [q for name, q in quantizers(made) if "weight" not in name]
    assert all(isinstance(q, DynamicQuantizer) for q in activations)
    shares = {name.rpartition(".")[0]: q.share for name, q in quantizers(made) if name.endswith("input_quantizer")}
    wanted = {"dynamic_tensor": "tensor", "dynamic_token": "token", "dynamic_group": 3}[activation]
    assert shares["attention.to_q"] == shares["own.q"] == wanted and shares["conv_in"] == "tensor"
    # the ends have their own width; the map of attention is nowhere negative
    assert made.conv_in.input_quantizer.bits == made.conv_out.input_quantizer.bits == 16
    static = network("static", activation_symmetric=symmetric)[3]
    assert report.totals["bops"] == static.totals["bops"] and report.totals["coverage"] == static.totals["coverage"]
    assert report.totals["coverage"]["everything"] == 1 and "dynamic_scales" not in static.totals


@pytest.mark.parametrize(("activation", "per_token"), [
    ("dynamic_tensor", None), ("dynamic_token", 1), ("dynamic_group", 3)
])
def test_the_report_counts_scales(activation, per_token):
    report = network(activation, activation_group_size=3)[3]
    counts = {row.name: row.dynamic_scales for row in report.rows if row.dynamic_scales}
    linear = 16 * per_token if per_token else 1
    assert counts["conv_in"] == 1 and counts["attention.to_q"] == counts["own.q"] == linear
    assert {counts[f"{name}.{product}"] for name in ("attention", "own") for product in ("qk", "av")} == {2}
    assert report.totals["dynamic_scales"] == sum(counts.values())
    assert f"{sum(counts.values())} per sample" in report.summary()
    entries = report.to_dict()["layers"]
    assert all(("dynamic_scales" in entry) == (entry["name"] in counts) for entry in entries)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_proof_sees_what_does_not_lie_on_the_grid(states, kind):
    _, made, _, report = network("dynamic_token", kind)
    inputs = (states.to(kind),)
    assert refuted(report, proven(made, report, inputs)) == []
    handle = made.own.q.input_quantizer.register_forward_hook(lambda _, __, y: y * 1.0371)
    assert [row.name for row in refuted(report, proven(made, report, inputs))] == ["own.q"]
    handle.remove()


def test_saved_and_loaded(states, tmp_path):
    full, made, rules, report = network("dynamic_group", activation_group_size=4)
    save_quantized(tmp_path, made, rules, report, {})
    loaded = copy.deepcopy(full)
    again = load_quantized_(loaded, tmp_path, EXAMPLE)
    assert torch.equal(loaded(states), made(states)) and again.to_dict() == report.to_dict()
    shares = [q.share for name, q in quantizers(loaded) if "weight" not in name]
    assert shares == [q.share for name, q in quantizers(made) if "weight" not in name]


def test_engines_refuse_dynamic_ranges():
    made = network("dynamic_token")[1]
    with pytest.raises(ConfigError, match=r"runtime=openvino: .*dynamic ranges.*quantization.activation=static"):
        integer_plan(made, asked="runtime=openvino")


@pytest.mark.parametrize(("settings", "said"), [
    ({"bits": (4, 8)}, "one width"), ({"bits": 8, "bins": 2}, "no bins"),
    ({"bits": 8, "dynamic": "row"}, "choose tensor"), ({"bits": 8, "dynamic": 0}, "choose tensor"),
])
def test_specs_that_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        TensorSpec(**{"dynamic": "token"} | settings)
    with pytest.raises(ConfigError, match="a weight"):
        QuantSpec(weight=TensorSpec(8, dynamic="token"))
