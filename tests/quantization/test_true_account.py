"""Coverage is claimed for what is really multiplied: weights that are computed, shared or rewritten, other forwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from ptq_exp.errors import PTQError, QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Policy,
    QuantConv2d,
    Widths,
    calibrate_,
    calibrating,
    proven,
    quantize_,
    quantizers,
)
from ptq_exp.quantization.obstacles import weight_marks

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:.*spectral_norm.*")
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MID = 8 * 8 * 9 * 64  # multiply-accumulates of `mid`
ENDS = 2 * 8 * 9 * 64


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Low(nn.Conv2d):
    """With a low-rank branch of its own, as adapters have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def hooked(write):
    def wrap(layer):
        layer.register_forward_pre_hook(lambda module, _: write(module))
        return layer

    return wrap


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(0.9)


def as_data(layer):
    layer.weight.data = layer.weight.data * 0.9


def as_buffer(layer):
    weight = layer.weight.detach().clone()
    del layer._parameters["weight"]
    layer.register_buffer("weight", weight)
    return layer


def other_forward(layer):
    layer.forward = lambda x: F.conv2d(x, layer.weight.abs(), layer.bias, padding=1)
    return layer


class Net(nn.Module):
    """Three convolutions; `wrap` changes the middle one, `use` calls it."""

    def __init__(self, wrap=lambda layer: layer, use=lambda layer, h: layer(h)):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.mid, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 3)
        self.two.padding = (1, 1)
        self.mid, self.use = wrap(self.mid), use

    def forward(self, x):
        return self.two(self.use(self.mid, self.one(x)).relu())


def quantized(net, x=X):
    net = net.eval().requires_grad_(False)
    net(x)
    report = quantize_(net, Policy(attention=False, first=(), last=()).rules(Widths(2, 8)), (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    return report


def row_of(report, name):
    return next(row for row in report.rows if row.name == name)


def levels(layer):
    return max(len(row.unique()) for row in layer.weight.detach().flatten(1))


@pytest.mark.parametrize(("wrap", "reason"), [
    (weight_norm, "made of weight_g, weight_v"), (spectral_norm, "made of weight_orig, weight_u, weight_v"),
    (lambda m: prune.l1_unstructured(m, "weight", 0.5), "made of weight_orig, weight_mask"),
    (parametrizations.weight_norm, "ParametrizedConv2d is a subclass of Conv2d"),
    (as_buffer, "its weight is no parameter"), (other_forward, "its forward was replaced"),
    (hooked(in_place), "its weight is changed when the network runs"), (hooked(as_data), "its weight is changed"),
    (lambda m: Standardised(8, 8, 3, padding=1), "Standardised is a subclass"),
], ids=["weight_norm", "spectral_norm", "pruning", "parametrization", "buffer", "forward", "in place", "data",
        "standardised"])
def test_a_weight_that_is_not_the_stored_one_is_left_alone(wrap, reason):
    net = Net(wrap)
    report = quantized(net)
    row = row_of(report, "mid")
    assert not row.covered and reason in row.reason and row.macs == MID and type(net.mid) is not QuantConv2d
    assert report.totals["coverage"]["conv_linear"] == pytest.approx(ENDS / (MID + ENDS))
    assert row_of(report, "one").covered and levels(net.one) <= 4
    assert proven(net, report, (X,)) == report


def test_what_a_hook_writes_back_is_found_when_it_is_calibrated():
    def wrap(layer):
        layer.register_buffer("stored", layer.weight.detach().clone())
        return hooked(lambda module: module.weight.data.copy_(module.stored))(layer)

    with pytest.raises(QuantizationError, match=r"mid\.weight_quantizer: \d+ of 576 weights are not on .*keep_fp"):
        quantized(Net(wrap))


def test_adapters_are_layers_of_their_own():
    report = quantized(Net(lambda m: Low(8, 8, 3, padding=1)))
    assert [row_of(report, name).macs for name in ("mid", "mid.down", "mid.up")] == [MID, 8 * 2 * 64, 8 * 2 * 64]
    assert [row_of(report, name).covered for name in ("mid", "mid.down", "mid.up")] == [False, True, True]


@pytest.mark.parametrize(("use", "covered"), [
    (lambda layer, h: layer(layer(h)), True), (lambda layer, h: layer.forward(h), True),
    (lambda layer, h: torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False), True),
    (lambda layer, h: F.conv2d(h, layer.weight, layer.bias, padding=1), False),
    (lambda layer, h: layer(F.conv2d(h, layer.weight, layer.bias, padding=1)), False),
    (lambda layer, h: F.conv2d(h, layer.weight.tanh(), layer.bias, padding=1), False),
], ids=["twice", "forward", "checkpoint", "outside", "also outside", "a function of it"])
def test_a_weight_multiplied_outside_of_its_layer_is_not_covered(use, covered):

    net = Net(use=use)
    report = quantized(net)
    assert row_of(report, "mid").covered == covered
    assert (report.totals["coverage"]["everything"] == 1) == covered
    assert (levels(net.mid) <= 4) == (type(net.mid) is QuantConv2d)
    checked = proven(net, report, (X,))
    assert checked == report


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_whose_input_or_output_a_hook_changes_is_quantized_truly(hook):
    net = Net()
    getattr(net.mid, hook)(lambda _, args, *output: 2 * (output or args)[0] if output else (2 * args[0],))
    report = quantized(net)
    assert report.totals["coverage"]["everything"] == 1 and proven(net, report, (X,)) == report


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.out, self.turned = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight, self.out.weight = self.one.weight, self.table.weight
        self.turned.weight = nn.Parameter(self.table.weight.detach().t())

    def forward(self, x):
        return self.turned(self.out(self.own(self.two(self.one(x)))))


def test_shared_weights_are_left_alone():
    net, x = Shared(), torch.randn(6, 8)
    report = quantized(net, x)
    reasons = {row.name: row.reason for row in report.rows if row.scope == "conv_linear"}
    assert reasons == {
        "one": "left alone: its weight is also that of two", "two": "left alone: its weight is also that of one",
        "own": "", "out": "left alone: its weight is also that of table, turned",
        "turned": "left alone: its weight is also that of out, table",
    }
    assert report.totals["params"] == sum(parameter.numel() for parameter in net.parameters())


def test_weights_side_by_side_in_one_storage_are_not_shared():
    net, flat = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(32)
    for number, layer in enumerate(net):
        layer.weight = nn.Parameter(flat[16 * number : 16 * (number + 1)].view(4, 4))
    assert quantized(net, torch.randn(8, 4)).totals["coverage"]["everything"] == 1


def test_lazy_layers_are_refused_in_a_line():
    with pytest.raises(PTQError, match=r"1\.weight is not initialised: run the network once"):
        rules = Policy(attention=False).rules(Widths(8, 8))
        quantize_(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), rules, (X[:1],))


def test_calibration_sees_the_network_as_it_is_used():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4))
    x = torch.ones(64, 4)
    quantize_(net, Policy(attention=False, first=(), last=()).rules(Widths(8, 8)), (x[:1],))
    net.train()
    calibrate_(net, "minmax", [(x,)])
    assert all(module.training for module in net.modules())
    with calibrating(net):
        assert not any(module.training for module in net.modules())
    reach = net[2].input_quantizer.scale * 255  # dropout divides what it keeps by 0.1
    with torch.no_grad():
        seen = net[0](x)
    assert reach.item() == pytest.approx(float(seen.max().clamp(min=0) - seen.min().clamp(max=0)), rel=0.05)
    assert all(isinstance(q, ActivationQuantizer) or q.baked for _, q in quantizers(net))


class OwnProducts(nn.Module):
    """A convolution and a linear map by parameters of its own, between two layers; and a product with a constant."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 1), nn.Linear(6, 5)
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = F.conv2d(self.one(x), self.kernel * 2, padding=1)
        return self.two(F.linear(x, self.matrix)) @ torch.ones(5, 7)


def test_layers_written_as_functions_stand_in_the_coverage_of_layers():
    report = quantized(OwnProducts(), torch.randn(8, 1, 6, 6))
    outside = 36 * 4 * 4 * 9 + 24 * 6 * 6  # of 6 x 6 positions; of 4 x 6 rows
    covered = 36 * 4 + 24 * 6 * 5
    assert (row_of(report, "(outside)").macs, row_of(report, "(other)").macs) == (outside, 24 * 5 * 7)
    assert report.totals["macs"]["conv_linear"] == outside + covered
    assert report.totals["coverage"]["conv_linear"] == pytest.approx(covered / (outside + covered))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "odd", "inside another", "channels last"])
def test_the_mark_of_a_weight_tells_other_values(dtype, layout):
    """Although it is the sum of its bits as larger integers, where they can be taken so."""
    odd, even = torch.randn(17).to(dtype), torch.randn(4, 8, 3, 3).to(dtype)
    weight = {"odd": odd[:15].view(3, 5, 1, 1), "inside another": odd[1:17].view(4, 4, 1, 1)}.get(layout, even)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    layer.weight = nn.Parameter(weight)
    if layout == "channels last":
        layer.to(memory_format=torch.channels_last)
    before = weight_marks({"layer": layer})
    assert weight_marks({"layer": layer}) == before
    layer.weight.data[-1, -1, 0, 0] += 1  # which the version of the parameter does not tell
    assert weight_marks({"layer": layer}) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_mark_of_a_weight_tells_other_signs(dtype, layout):
    """In an even number of larger integers their highest bits add up to nothing."""
    layer = nn.Conv2d(4, 8, 2).to(dtype=dtype, memory_format=layout)
    before = weight_marks({"layer": layer})
    values = layer.weight.data.abs_().as_strided((layer.weight.numel(),), (1,))  # as they lie in memory
    positive = weight_marks({"layer": layer})
    several = 8 // values.element_size()
    values[several - 1 :: several].neg_()
    assert before != positive != weight_marks({"layer": layer})
