"""Quantized layers and attention, `quantize_`, and the calibration verbs on a small U-Net."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from ptq_exp.errors import ConfigError, PTQError, QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Mode,
    PerChannel,
    PerTensor,
    Policy,
    QRange,
    QuantAttention,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    calibrate_,
    calibrate_weights_,
    calibrating,
    disabled,
    fake_quantize,
    finish_calibration,
    freeze_weights_,
    quantize_,
    quantizers,
    set_mode,
)
from ptq_exp.quantization.granularity import segmented_as

METRIC = "minmax"  # these tests are about placement; the cheapest search will do


def calibrate(model, *batches):
    calibrate_(model, METRIC, batches)
    return model


def output(model, batch):
    with torch.no_grad():
        return model(*batch).sample


@pytest.fixture
def quantized(unet, example, batch):
    """The small U-Net, W8A8 by the default policy, calibrated."""
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    return calibrate(unet, batch)


# One layer.

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), QuantConv2d, (2, 4, 5, 5)),
    "conv2d_circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        QuantConv2d,
        (2, 4, 5, 5),
    ),
    "conv2d_reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        QuantConv2d,
        (2, 4, 5, 5),
    ),
    "conv2d_strided": (
        lambda: nn.Conv2d(4, 6, 2, stride=2, dilation=2, bias=False),
        QuantConv2d,
        (2, 4, 7, 7),
    ),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), QuantConv2d, (2, 4, 5, 5)),
    "conv2d_unbatched": (lambda: nn.Conv2d(4, 6, 3), QuantConv2d, (4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), QuantConv1d, (2, 4, 9)),
    "linear": (lambda: nn.Linear(4, 6), QuantLinear, (2, 4)),
    "linear_3d": (lambda: nn.Linear(4, 6, bias=False), QuantLinear, (2, 3, 4)),
}


def _by_hand(fp, weight, x):
    """The functional form of a full-precision layer, on other operands."""
    if isinstance(fp, nn.Linear):
        return F.linear(x, weight, fp.bias)
    copied = copy.deepcopy(fp)
    copied.weight.data = weight
    return copied(x)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("segments", [None, (1, 3)], ids=["whole", "split"])
def test_a_layer_computes_on_fake_quantized_operands(kind, segments):
    make, quantized_type, shape = LAYERS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    fp, axis = copy.deepcopy(model[0]), 1 - model[0].weight.ndim
    weight_segments = segments if fp.weight.shape[1] == 4 else None
    spec = QuantSpec(
        TensorSpec(4, granularity=segmented_as(PerChannel(), weight_segments)),
        TensorSpec(3, granularity=segmented_as(PerTensor(), segments)),
    )
    quantize_(model, [Rule("*", spec)], (torch.randn(1, *shape[1:]),) if shape[0] == 2 else (x[None],))
    assert type(model[0]) is quantized_type
    calibrate(model, (x,))

    def low_high(part, dims):
        return part.amin(dims, keepdim=True).clamp(max=0), part.amax(dims, keepdim=True).clamp(min=0)

    def by_hand(tensor, bits, dims, parts, axis):
        done = []
        for part in tensor.split(parts, dim=axis) if parts else (tensor,):
            low, high = low_high(part, dims)
            scale = (high - low) / (2**bits - 1)
            zero = torch.round(-low / scale)
            done.append((torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale)
        return torch.cat(done, dim=axis)

    weight = by_hand(fp.weight.detach(), 4, tuple(range(1, fp.weight.ndim)), weight_segments, 1)
    inputs = by_hand(x, 3, tuple(range(x.ndim)), segments, axis)
    assert torch.allclose(model[0].weight, weight, rtol=0, atol=1e-5)
    assert torch.allclose(model(x), _by_hand(fp, weight, inputs), rtol=0, atol=1e-5)


def test_a_layer_can_be_quantized_at_its_output():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(64, 4)
    expected = model(x).detach()
    quantize_(model, [Rule("*", QuantSpec(output=TensorSpec(2)))], (x[:1],))
    calibrate(model, (x,))
    assert set(n for n, _ in quantizers(model)) == {"0.output_quantizer"}
    assert len(model(x).unique()) == 4
    step = model[0].output_quantizer.scale
    assert (model(x) - expected).abs().max() <= step / 2 * 1.001 + 1e-6


def test_segments_must_fit_the_layer_and_the_model_stays_as_it_was(example, unet):
    before = set(unet.state_dict())
    spec = QuantSpec(TensorSpec(8), TensorSpec(8, granularity=Segments((3, 4))))
    with pytest.raises(QuantizationError, match="conv_out.input_quantizer.*sum to 7.*8 channels"):
        quantize_(unet, [Rule("conv_out", spec), Rule("*", QuantSpec(TensorSpec(8)))], example)
    assert set(unet.state_dict()) == before and next(quantizers(unet), None) is None


# The retyped model.


def test_full_precision_names_and_types_are_kept(unet, example):
    types = {name: type(module) for name, module in unet.named_modules()}
    keys = list(unet.state_dict())
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    after = unet.state_dict()
    assert [key for key in after if "_quantizer." not in key] == keys
    assert all(isinstance(unet.get_submodule(name), kind) for name, kind in types.items())
    changed = {type(unet.get_submodule(name)) for name, kind in types.items()} - set(types.values())
    assert changed == {QuantConv2d, QuantLinear, QuantAttention}


def test_quantizers_off_are_bitwise_full_precision(unet, example, batch):
    explicit = copy.deepcopy(unet)
    for module in explicit.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    fused, plain = output(unet, batch), output(explicit, batch)
    quantize_(unet, Policy().rules(Widths(4, 4)), example)
    with disabled(unet):
        off = output(unet, batch)
    assert torch.equal(off, plain)
    assert (off - fused).abs().max() <= 1e-5
    set_mode(unet, "off")
    assert torch.equal(output(unet, batch), plain)


def test_modes_are_restored(quantized, batch):
    next(quantizers(quantized))[1].mode = Mode.OFF
    modes = [quantizer.mode for _, quantizer in quantizers(quantized)]
    with disabled(quantized):
        assert {quantizer.mode for _, quantizer in quantizers(quantized)} == {Mode.OFF}
    with pytest.raises(KeyboardInterrupt), calibrating(quantized):
        output(quantized, batch)
        raise KeyboardInterrupt
    assert [quantizer.mode for _, quantizer in quantizers(quantized)] == modes
    assert not any(q.saw_data for _, q in quantizers(quantized) if isinstance(q, ActivationQuantizer))


def test_a_deepcopy_is_independent(quantized, batch):
    before = output(quantized, batch)
    copied = copy.deepcopy(quantized)
    assert torch.equal(output(copied, batch), before)
    with torch.no_grad():
        for _, quantizer in quantizers(copied):
            quantizer.scale.mul_(2)
    set_mode(copied, "off")
    assert torch.equal(output(quantized, batch), before)


def test_pickle_and_strict_reload_are_bitwise_equal(quantized, unet, _unet, example, batch):
    expected = output(quantized, batch)
    assert torch.equal(output(pickle.loads(pickle.dumps(quantized)), batch), expected)
    fresh = copy.deepcopy(_unet)
    quantize_(fresh, Policy().rules(Widths(8, 8)), example)
    fresh.load_state_dict(quantized.state_dict(), strict=True)
    assert torch.equal(output(fresh, batch), expected)
    freeze_weights_(fresh)  # the flag came with the state: nothing is quantized twice
    assert torch.equal(output(fresh, batch), expected)


def test_a_full_precision_checkpoint_loads(unet, _unet, example):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    missing, unexpected = unet.load_state_dict(_unet.state_dict(), strict=False)
    assert not unexpected and all("_quantizer." in key for key in missing)


@pytest.mark.parametrize(("bits", "worst"), [(16, 1e-3), (8, 0.15)])
def test_the_error_shrinks_with_the_bits(unet, example, batch, bits, worst):
    expected = output(unet, batch)
    activation = TensorSpec(bits)
    spec = QuantSpec(
        TensorSpec(bits, granularity=PerChannel()), activation, softmax=TensorSpec(bits, symmetric=True)
    )
    rules = [Rule("*to_[qkv]", QuantSpec(spec.weight, activation, activation)), Rule("*", spec)]
    quantize_(unet, rules, example)
    calibrate(unet, batch)
    error = (output(unet, batch) - expected).norm() / expected.norm()
    assert 0 < error < worst


def test_quantizing_twice_is_an_error(unet, example):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize_(unet, Policy().rules(Widths(8, 8)), example)


def test_a_rule_without_a_match_leaves_the_model_alone(unet, example):
    with pytest.raises(ConfigError, match="conv_inn"):
        quantize_(unet, [Rule("conv_inn", None), *Policy().rules(Widths(8, 8))], example)
    assert next(quantizers(unet), None) is None


# Calibration.


def test_frozen_weights_lie_on_their_grid(unet, example):
    names = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    quantize_(unet, Policy(first=(), last=()).rules(Widths(3, 8)), example)
    calibrate_weights_(unet, METRIC)
    assert names
    for name in names:
        rows = unet.get_submodule(name).weight.detach().flatten(1)
        assert max(len(row.unique()) for row in rows) <= 2**3, name


def test_the_first_and_last_layer_stay_at_8_bits_or_more(unet, example):
    quantize_(unet, Policy().rules(Widths(4, 4)), example)
    for name, bits in [("conv_in", (8, 16)), ("conv_out", (8, 16)), ("mid_block.resnets.0.conv1", (4, 4))]:
        layer = unet.get_submodule(name)
        assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == bits


def test_weights_are_calibrated_before_activations(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    with pytest.raises(QuantizationError, match=r"\.weight_quantizer: not calibrated"), calibrating(unet):
        output(unet, batch)


def test_running_before_the_end_of_calibration_is_an_error(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    calibrate_weights_(unet, METRIC)
    with pytest.raises(QuantizationError, match="input_quantizer: not calibrated"):
        output(unet, batch)


def test_activations_are_observed_unquantized_on_quantized_weights(unet, example, batch):
    quantize_(unet, Policy().rules(Widths(4, 4)), example)
    calibrate_weights_(unet, METRIC)
    with disabled(unet):
        expected = output(unet, batch)
    with calibrating(unet):
        assert torch.equal(output(unet, batch), expected)


class Branch(nn.Module):
    """The second layer is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_a_quantizer_that_saw_no_data_is_named():
    model, x = Branch(), torch.randn(8, 4)
    quantize_(model, [Rule("*", QuantSpec(TensorSpec(8), TensorSpec(8)))], (x[:1],))
    calibrate_weights_(model, METRIC)
    with calibrating(model):
        model(x)
    with pytest.raises(QuantizationError, match=r"1 activation.*unused\.input_quantizer"):
        finish_calibration(model, METRIC)
    assert not model.used.input_quantizer.ready  # all or nothing


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ranges_of_a_device_are_found_by_the_caller_whose_stream_its_data_are_in(monkeypatch, device):
    threads = torch.get_num_threads()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_(model, [Rule("*", QuantSpec(input=TensorSpec(8)))], (torch.zeros(1, 4),))
    seen = []
    monkeypatch.setattr(ActivationQuantizer, "saw_data", True)
    monkeypatch.setattr(ActivationQuantizer, "finish", lambda *_: seen.append(threading.current_thread()))
    torch.set_num_threads(2)
    try:
        finish_calibration(model.to(device), METRIC)
    finally:
        torch.set_num_threads(threads)
    assert [thread is threading.current_thread() for thread in seen] == [device != "cpu"] * 2


def test_an_unused_layer_can_be_kept_by_a_rule():
    model, x = Branch(), torch.randn(8, 4)
    rules = [Rule("unused", None, "never called"), Rule("*", QuantSpec(TensorSpec(8), TensorSpec(8)))]
    quantize_(model, rules, (x[:1],))
    calibrate(model, (x,))
    assert type(model.unused) is nn.Linear and type(model.used) is QuantLinear


def test_contexts_add_up_until_the_end():
    model = nn.Sequential(nn.Linear(1, 1))
    quantize_(model, [Rule("*", QuantSpec(input=TensorSpec(8)))], (torch.zeros(1, 1),))
    for value in (-1.0, 3.0):
        with calibrating(model):
            model(torch.tensor([[value]]))
    finish_calibration(model, METRIC)
    assert model[0].input_quantizer.scale.item() == pytest.approx(4 / 255, rel=1e-3)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_nan_is_reported_with_the_name_of_its_layer(unet, example, batch, where):
    quantize_(unet, Policy().rules(Widths(8, 8)), example)
    with pytest.raises(PTQError, match=rf"mid_block\.resnets\.1\.conv1\.{where}_quantizer"):
        if where == "weight":
            unet.mid_block.resnets[1].conv1.weight.data[3, 2] = float("nan")
            calibrate_weights_(unet, METRIC)
        else:
            calibrate_weights_(unet, METRIC)
            unet.mid_block.resnets[1].norm1.weight.data[0] = float("nan")
            with calibrating(unet):
                output(unet, batch)


# Attention.


def _attention_by_hand(attention, x):
    """Residual self-attention on ``[B, C, H, W]``, its operands fake-quantized by the found ranges."""

    def q(quantizer, tensor):
        return fake_quantize(tensor, *(getattr(quantizer, field).reshape(()) for field in QRange._fields))

    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)
    heads = {}
    for role in "qkv":
        layer = attention.get_submodule(f"to_{role}")
        out = q(layer.output_quantizer, F.linear(q(layer.input_quantizer, tokens), layer.weight, layer.bias))
        heads[role] = out.unflatten(2, (attention.heads, -1)).transpose(1, 2)
    scores = heads["q"] @ heads["k"].transpose(-1, -2) * heads["q"].shape[-1] ** -0.5
    mixed = q(attention.softmax_quantizer, scores.softmax(-1)) @ heads["v"]
    last = attention.to_out[0]
    tokens = F.linear(q(last.input_quantizer, mixed.transpose(1, 2).flatten(2)), last.weight, last.bias)
    return tokens.transpose(1, 2).reshape(x.shape) + x


def test_attention_quantizes_q_k_v_and_the_softmax_map(quantized):
    attention, x = quantized.mid_block.attentions[0], torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        found, expected = attention(x), _attention_by_hand(attention, x)
    # A value half way between two levels may round either way: almost all elements agree.
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.95
    assert (found - expected).abs().max() < 0.05


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_softmax_map_is_unsigned_with_zero_point_0(unet, example, batch, bits):
    quantize_(unet, Policy().rules(Widths(8, 8, softmax=bits)), example)
    calibrate(unet, batch)
    quantizer = unet.mid_block.attentions[0].softmax_quantizer
    levels = [getattr(quantizer, field).item() for field in ("zero_point", "qmin", "qmax")]
    assert levels == [0, 0, 2**bits - 1]


def test_attention_can_stay_full_precision(unet, example):
    report = quantize_(unet, Policy(attention=False).rules(Widths(8, 8)), example)
    assert type(unet.mid_block.attentions[0]) is Attention
    assert type(unet.mid_block.attentions[0].processor) is not AttnProcessor
    assert type(unet.mid_block.attentions[0].to_q) is QuantLinear
    assert not any(row.covered for row in report.rows if row.scope == "attention")


def test_attention_that_the_explicit_path_would_change_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = Attention(16, heads=2, dim_head=8, qk_norm="layer_norm")
            self.rescaled = Attention(16, heads=2, dim_head=8)
            self.rescaled.scale = 0.1
            self.plain = Attention(16, heads=2, dim_head=8)

        def forward(self, x):
            return self.plain(self.rescaled(self.normed(x)))

    model, operand = Net(), TensorSpec(8)
    rules = [
        Rule("*to_[qkv]", QuantSpec(operand, operand, operand)),
        Rule("*", QuantSpec(operand, operand, softmax=TensorSpec(8, symmetric=True))),
    ]
    rows = {row.name: row for row in quantize_(model, rules, (torch.randn(1, 5, 16),)).rows}
    assert [type(m) for m in model.children()] == [Attention, Attention, QuantAttention]
    assert "normalises q or k" in rows["normed.qk"].reason and "scale 0.1" in rows["rescaled.av"].reason
    # Quantized outputs of to_q and to_k do not make quantized operands when a norm follows.
    assert rows["normed.qk"].weight_bits is None and rows["normed.qk"].activation_bits is None
    assert rows["plain.qk"].covered and rows["plain.av"].covered
