"""The proof of coverage: operands are looked at where they are multiplied, in one evaluation."""

import copy

import pytest
import torch

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Mode,
    Policy,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    choose_qparams,
    find_concats,
    of_samples,
    proven,
    quantize_,
    refuted,
    segmented,
    select_row,
    step_of,
)

SETTINGS = {
    "plain": {}, "outputs": {"activation_site": "output"}, "groups": {"weight_granularity": "group", "group_size": 3},
    "tensor": {"weight_granularity": "tensor"}, "symmetric": {"weight_symmetric": True, "activation_symmetric": True},
    "bins": {"bins": 3}, "widths": {"activation": (4, 8)}, "wide softmax": {"softmax": 16},
}


def made(unet, example, batch, *, split=False, bins=1, activation=8, softmax=8, **settings):
    """The calibrated network and its report; its activation ranges are found on `batch`."""
    rules = Policy(**settings).rules(Widths(4, activation, softmax), bins)
    rules = segmented(rules, find_concats(unet, example)) if split else rules
    report = quantize_(unet, rules, example)
    calibrate_weights_(unet, "minmax")
    for row in range(bins):
        if step_of(unet) is not None:
            select_row(unet, row)
        calibrate_activations_(unet, "minmax", [batch])
    return report


def checked(unet, report, batch):
    step = step_of(unet)
    with of_samples(unet, None if step is None else torch.arange(len(batch[0])) % step.rows):
        return proven(unet, report, batch)


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.float32) for name in SETTINGS), ("bins", torch.bfloat16), ("tensor", torch.bfloat16),
])
def test_it_bears_out_what_is_true(name, dtype, unet, example, batch):
    unet, batch = unet.to(dtype), (batch[0].to(dtype), batch[1])
    report = made(unet, (example[0].to(dtype), example[1]), batch, split=True, **SETTINGS[name])
    state, random = copy.deepcopy(unet.state_dict()), torch.get_rng_state()
    assert checked(unet, report, batch) == report
    assert any(row.covered for row in report.rows) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def faults(unet, report, batch):
    return {row.name: row.reason for row in refuted(report, checked(unet, report, batch))}


def test_a_weight_off_its_grid_is_named(unet, example, batch):
    report = made(unet, example, batch)
    layer = unet.mid_block.resnets[0].conv1
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += layer.weight_quantizer.scale[0, 0] / 3
    found = faults(unet, report, batch)
    assert found == {"mid_block.resnets.0.conv1": "weight does not lie on the grid of its range (1 elements)"}
    row = next(row for row in checked(unet, report, batch).rows if row.name in found)
    assert (row.weight_bits, row.activation_bits) == (None, 8)


def test_an_input_that_is_not_quantized_is_named(unet, example, batch):
    report = made(unet, example, batch)
    unet.mid_block.resnets[0].conv1.input_quantizer.mode = Mode.OFF
    (name, reason), = faults(unet, report, batch).items()
    assert name == "mid_block.resnets.0.conv1" and reason.startswith("activation does not lie on the grid")


@pytest.mark.parametrize(("part", "products"), [("to_q", {"qk"}), ("to_k", {"qk"}), ("to_v", {"av"})])
def test_an_operand_of_attention_that_a_hook_changes_is_never_covered(part, products, unet, example, batch):
    attention = unet.mid_block.attentions[0]
    attention.get_submodule(part).register_forward_hook(lambda _, args, output: output * 1.01)
    report = made(unet, example, batch)
    rows = {row.name: row for row in report.rows if row.name.startswith("mid_block") and row.scope == "attention"}
    assert {name.rpartition(".")[2] for name, row in rows.items() if not row.covered} == products
    assert faults(unet, report, batch) == {}


def test_a_hook_that_comes_later_is_found(unet, example, batch):
    report = made(unet, example, batch)
    attention = unet.mid_block.attentions[0]
    attention.to_q.register_forward_hook(lambda _, args, output: output.add_(1e-3))
    attention.softmax_quantizer.register_forward_hook(lambda _, args, output: output + 1e-3)
    found = faults(unet, report, batch)
    assert set(found) == {"mid_block.attentions.0.qk", "mid_block.attentions.0.av"}


def test_an_output_that_a_hook_changes_feeds_no_covered_layer():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
    x = torch.randn(8, 4)
    rules = Policy(activation_site="output", first=(), last=(), attention=False).rules(Widths(8, 8))
    plain = made_of(copy.deepcopy(net), rules, x)
    net[0].register_forward_hook(lambda _, args, output: output * 1.01)
    assert [row.covered for row in plain.rows] == [False, True]
    assert [row.covered for row in made_of(net, rules, x).rows] == [False, False]


def made_of(net, rules, x):
    return quantize_(net, rules, (x[:1],))


def test_layers_that_the_example_did_not_call_are_named():
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.late = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.late(self.always(x)) if float(x.abs().max()) > 0 else self.always(x)

    net, x = Gate().eval(), torch.randn(8, 4)
    report = quantize_(net, Policy(first=(), last=(), attention=False).rules(Widths(8, 8)), (torch.zeros(1, 4),))
    calibrate_weights_(net, "minmax")
    calibrate_activations_(net, "minmax", [(x,)])
    found = proven(net, report, (x,))
    assert found.not_counted == ("late (not called by the example)",) and found.totals["coverage"]["everything"] is None
    assert report.totals["coverage"]["everything"] == 1


def test_one_row_of_ranges_must_be_in_force(unet, example, batch):
    report = made(unet, example, batch, bins=2)
    fresh = copy.deepcopy(unet)
    step_of(fresh).is_set = False
    with pytest.raises(QuantizationError, match="no row of ranges is in force"):
        proven(fresh, report, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_a_quantizer_returns_lies_on_its_grid(bits, dtype):
    x = (torch.randn(64, 33, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    quantizer = ActivationQuantizer(bits, symmetric=False, name="x")
    quantizer.set_range(choose_qparams(x.float().min(), x.float().max(), bits, symmetric=False))
    values = quantizer(x)
    assert quantizer.off_grid(values) == 0
    step = float(quantizer.scale)
    if step > 8 * torch.finfo(dtype).eps * float(values.abs().max()):
        assert quantizer.off_grid(values + step / 3) == values.numel()
    assert quantizer.off_grid(values + 2**bits * step) >= values.numel() / 2  # beyond the last level
    assert quantizer.off_grid(torch.full_like(values, float("nan"))) == values.numel()
