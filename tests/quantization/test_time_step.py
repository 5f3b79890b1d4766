"""The shared index of the range tables: sharing, copies, errors, and a compiled graph that follows it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import (
    Policy,
    QuantSpec,
    Rule,
    Segments,
    Step,
    TensorSpec,
    Widths,
    calibrate_,
    quantize_,
    select_row,
    step_of,
)


class Net(nn.Module):
    """A convolution and a linear layer with two candidate widths, and one layer with one."""

    def __init__(self):
        super().__init__()
        self.conv, self.line, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.line(self.conv(x)))


def spec(bits, **settings):
    return QuantSpec(TensorSpec(8), TensorSpec(bits, **settings))


@pytest.fixture
def x():
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net(x):
    """Calibrated, inputs of the convolution and of the first linear layer at 2 or 8 bits; no row chosen."""
    torch.manual_seed(0)
    net = Net()
    rules = [Rule("last", spec(8)), Rule("conv", spec((2, 8), granularity=Segments((1, 1)))), Rule("*", spec((2, 8)))]
    quantize_(net, rules, (x[:1],))
    calibrate_(net, "minmax", [(x,)])
    return net


def test_all_quantizers_with_candidates_share_one_step(net):
    step = step_of(net)
    assert isinstance(step, Step) and step.rows == 2
    assert net.conv.input_quantizer.step is step and net.line.input_quantizer.step is step
    assert net.last.input_quantizer.step is None and not hasattr(net.conv.weight_quantizer, "step")


def test_before_a_row_is_chosen_quantizing_says_what_to_do(net, x):
    with pytest.raises(QuantizationError, match=r"conv\.input_quantizer.*\(2, 8\).*select_row"):
        net(x)
    select_row(net, 1)
    net(x)


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_an_error(net, x, row):
    with pytest.raises(QuantizationError, match=rf"row {row} is out of range, choose 0\.\.1"):
        select_row(net, row)
    assert not step_of(net).is_set


def test_a_tensor_chooses_like_a_number(net, x):
    outputs = []
    for row in (0, torch.tensor(0), torch.tensor([0]), 1, torch.tensor(1), torch.tensor([1], dtype=torch.int32)):
        select_row(net, row)
        outputs.append(net(x))
    assert all(torch.equal(outputs[0], same) for same in outputs[1:3])
    assert all(torch.equal(outputs[3], same) for same in outputs[4:])
    assert not torch.equal(outputs[0], outputs[3])
    with pytest.raises(QuantizationError, match=r"shape \[2\].*share one sampling step"):
        select_row(net, torch.tensor([0, 1]))


def test_setting_keeps_the_buffer_in_place(net):
    step = step_of(net)
    before = step.row
    step.set(1)
    step.set(torch.tensor(0))
    assert step.row is before and step.row.tolist() == [0] and step.row.dtype == torch.long


def test_a_model_without_candidates_has_no_step():
    model = nn.Sequential(nn.Linear(2, 2))
    quantize_(model, [Rule("*", spec(8))], (torch.zeros(1, 2),))
    assert step_of(model) is None
    with pytest.raises(QuantizationError, match="no activation quantizers with candidate widths"):
        select_row(model, 0)


def test_parts_quantized_apart_are_not_mistaken_for_one_model(net):
    both = nn.ModuleList([net, copy.deepcopy(net)])
    with pytest.raises(QuantizationError, match="2 independent steps"):
        select_row(both, 0)


def test_different_numbers_of_candidates_are_an_error_and_the_model_stays_as_it_was():
    net = Net()
    rules = [Rule("conv", spec((2, 8))), Rule("*", spec((2, 4, 8)))]
    with pytest.raises(ConfigError, match=r"conv\.input_quantizer.*\(2, 8\).*last\.input_quantizer.*\(2, 4, 8\)"):
        quantize_(net, rules, (torch.zeros(1, 2, 5, 5),))
    assert type(net.conv) is nn.Conv2d


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_share_a_step_of_their_own(net, x, clone):
    select_row(net, 0)
    low, copied = net(x), clone(net)
    assert copied.conv.input_quantizer.step is copied.line.input_quantizer.step is not step_of(net)
    assert torch.equal(copied(x), low)  # the choice is copied too
    select_row(copied, 1)
    assert torch.equal(net(x), low) and not torch.equal(copied(x), low)


def test_moving_a_model_keeps_the_sharing(net):
    net.to("meta")
    step = step_of(net)
    assert step.row.device.type == "meta" and step.row.shape == (1,)
    assert net.conv.input_quantizer.step is net.line.input_quantizer.step is step
    net.half()
    assert step_of(net).row.dtype == torch.long


def test_the_row_is_no_part_of_the_state_dict(net, x):
    state = net.state_dict()
    assert not any("step" in key or key.endswith("row") for key in state)
    assert state["conv.input_quantizer.scale"].shape == (2, 2)
    assert state["line.input_quantizer.scale"].shape == (2, 1)
    fresh = Net()
    rules = [Rule("last", spec(8)), Rule("conv", spec((2, 8), granularity=Segments((1, 1)))), Rule("*", spec((2, 8)))]
    quantize_(fresh, rules, (x[:1],))
    fresh.load_state_dict(state, strict=True)
    with pytest.raises(QuantizationError, match="select_row"):
        fresh(x)
    for row in (0, 1):
        select_row(fresh, row)
        select_row(net, row)
        assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_follows_the_row_without_compiling_again(net, x, backend):
    expected = []
    for row in (0, 1):
        select_row(net, row)
        with torch.no_grad():
            expected.append(net(x))
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled, step = torch.compile(net, fullgraph=True, backend=counter), step_of(net)
    for row in (0, 1, torch.tensor(0), torch.tensor([1]), 0):
        step.set(row)
        with torch.no_grad():
            found = compiled(x)
        torch.testing.assert_close(found, expected[int(row)], rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    assert not torch.equal(expected[0], expected[1])


def test_the_step_of_a_unet_reaches_the_operands_of_attention(unet, example):
    quantize_(unet, Policy().rules(Widths(8, (4, 8))), example)
    step = step_of(unet)
    attention = unet.mid_block.attentions[0]
    assert attention.to_q.output_quantizer.step is attention.to_k.input_quantizer.step is step
    assert attention.softmax_quantizer.step is None and unet.conv_in.input_quantizer.step is None
