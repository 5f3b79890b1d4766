"""A row for each sample of a batch: the same as each sample alone with its row, also where heads join the batch."""

import copy

import pytest
import torch
from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import (
    ActivationQuantizer,
    Policy,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    calibrating,
    of_samples,
    quantize_,
    quantizers,
    select_row,
    step_of,
)

ROWS = torch.tensor([2, 0, 2, 1, 0])


def calibrated(model, rules, example, batches):
    """`model`, quantized, with the ranges of one batch per row."""
    quantize_(model, rules, example)
    calibrate_weights_(model, "minmax")
    for row, batch in enumerate(batches):
        select_row(model, row)
        calibrate_activations_(model, "minmax", [batch])
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net(x):
    """A convolution with two segments and a layer over the channels, three bins."""
    torch.manual_seed(0)
    spec = TensorSpec(3, bins=3)
    rules = [Rule("0", QuantSpec(TensorSpec(8), TensorSpec(3, granularity=Segments((1, 3)), bins=3))),
             Rule("*", QuantSpec(TensorSpec(8), spec, spec))]
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Linear(6, 2))
    return calibrated(net, rules, (x[:1],), [(scale * x,) for scale in (1, 0.3, 2)])


def seen(model, inputs):
    """{quantizer: (input, output)} of a forward."""
    found = {}
    handles = [
        quantizer.register_forward_hook(lambda _, args, y, name=name: found.update({name: (args[0], y)}))
        for name, quantizer in quantizers(model)
        if isinstance(quantizer, ActivationQuantizer)
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def check_each_alone(model, inputs, rows):
    """Every quantizer gives each sample bit for bit what it gives it alone at its row, and rows differ."""
    with of_samples(model, rows):
        found = seen(model, inputs)
    differing = 0
    for name, (x, y) in found.items():
        quantizer = model.get_submodule(name)
        for row, part, expected in zip(rows.tolist(), x.chunk(len(rows)), y.chunk(len(rows)), strict=True):
            select_row(model, row)
            assert torch.equal(quantizer(part), expected), name
            select_row(model, (row + 1) % step_of(model).rows)
            differing += not torch.equal(quantizer(part), expected)
    return found, differing


def test_every_sample_is_quantized_as_alone_with_its_row(net, x):
    found, differing = check_each_alone(net, (x,), ROWS)
    assert len(found) == 3 and differing == 3 * len(ROWS)
    with of_samples(net, ROWS):
        together = net(x)
    for n, row in enumerate(ROWS.tolist()):
        select_row(net, row)
        torch.testing.assert_close(together[n : n + 1], net(x[n : n + 1]), rtol=0, atol=1e-6)


def test_merged_attention_heads_use_the_row_of_their_sample(unet, example, batch):
    x, t = batch[0][:3], batch[1][:3]
    batches = [(scale * x, t) for scale in (1, 0.2, 3)]
    model = calibrated(unet, Policy().rules(Widths(8, 3, softmax=3), bins=3), example, batches)
    found, differing = check_each_alone(model, (x, t), torch.tensor([1, 0, 2]))
    merged = {name for name, (read, _) in found.items() if len(read) > len(x)}
    assert merged == {name for name in found if name.endswith("softmax_quantizer")} and merged
    assert differing > 0.8 * 3 * len(found)


def test_equal_rows_are_the_row_of_the_whole_batch_and_what_was_chosen_returns(net, x):
    select_row(net, 1)
    expected, step = net(x), step_of(net)
    before = step.row
    with of_samples(net, torch.zeros(5, dtype=torch.long)):
        first = net(x)
        with of_samples(net, torch.full((5,), 1)):
            assert torch.equal(net(x), expected)
        assert torch.equal(net(x), first) and not torch.equal(first, expected)
    assert step.row is before and torch.equal(net(x), expected)
    fresh = copy.deepcopy(net)
    step_of(fresh).is_set = False
    with pytest.raises(ZeroDivisionError), of_samples(fresh, ROWS):
        raise ZeroDivisionError
    assert not step_of(fresh).is_set and len(step_of(fresh).row) == 1


def test_gradients_reach_the_rows_that_samples_use_and_no_other():
    quantizer = ActivationQuantizer(4, bins=3, symmetric=False, name="q")
    quantizer.scale.copy_(torch.tensor([[0.1], [0.2], [0.4]]))
    quantizer.zero_point.fill_(7), quantizer.qmax.fill_(15)
    quantizer.ready = True
    scale = quantizer.scale.clone().requires_grad_()
    x = torch.tensor([[0.231, -9.0], [0.5, 9.0]])
    with quantizer.step.each(torch.tensor([2, 0])):
        torch.func.functional_call(quantizer, {"scale": scale}, (x,)).sum().backward()
    # d/dscale: rounded level - x / scale inside, the clamped level (-7 or 8) outside
    assert scale.grad.flatten().tolist() == pytest.approx([(5 - 5.0) + 8, 0.0, (1 - 0.231 / 0.4) - 7], abs=1e-5)


def test_bfloat16_stays_bfloat16(net, x):
    quantizer = net[2].input_quantizer
    with of_samples(net, ROWS):
        assert quantizer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "message"), [
    (torch.tensor([0, 3]), r"found rows 0\.\.3, choose 0\.\.2"), (torch.tensor([-1, 0]), r"found rows -1\.\.0"),
    (torch.tensor([0.0, 1.0]), r"float32 of shape \[2\], expected int64 \[N\]"),
    (torch.tensor([[0], [1]]), r"shape \[2, 1\]"), (torch.zeros(0, dtype=torch.long), r"shape \[0\]"),
])
def test_rows_that_are_not_there_are_an_error(net, rows, message):
    with pytest.raises(QuantizationError, match=message), of_samples(net, rows):
        pass


def test_a_tensor_without_a_row_for_each_sample_is_an_error_that_names_the_layer(net, x):
    with of_samples(net, ROWS[:4]), pytest.raises(QuantizationError, match=r"0\.input_quantizer.*multiple of 4; keep"):
        net(x)
    with of_samples(net, ROWS), pytest.raises(QuantizationError, match=r"2\.input_quantizer.*shape \[6\]"):
        net[2](x[0, 0, 0])
    with calibrating(net), of_samples(net, ROWS), pytest.raises(QuantizationError, match="bin by bin"):
        net(x)


def test_models_without_rows_do_not_care(x):
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    with of_samples(model, ROWS):
        model(x)
