"""The quantizer module: modes, granularity, calibration, freezing, state."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq_exp.errors import PTQError, QuantizationError
from ptq_exp.quantization import ActivationQuantizer, Mode, QRange, Quantizer, WeightQuantizer, fake_quantize


def _range(scale, zero_point, qmin=0, qmax=15) -> QRange:
    return QRange(*(torch.as_tensor(value, dtype=torch.float32) for value in (scale, zero_point, qmin, qmax)))


def _grid(x, scale, zero_point, qmin=0, qmax=15):
    """Scalar arithmetic of the affine quantizer, as an oracle."""
    return (torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale


def test_off_returns_the_tensor_itself():
    quantizer = Quantizer(4, symmetric=False)
    quantizer.mode = Mode.OFF
    x = torch.randn(3, 5)
    assert quantizer(x) is x


def test_observing_returns_the_tensor_itself():
    quantizer = ActivationQuantizer(4, symmetric=False)
    quantizer.mode = Mode.OBSERVE
    x = torch.randn(3, 5)
    assert quantizer(x) is x and quantizer.saw_data


def test_quantizing_uncalibrated_names_the_layer():
    with pytest.raises(QuantizationError, match="down.conv1.input_quantizer.*not calibrated"):
        Quantizer(8, symmetric=False, name="down.conv1.input_quantizer")(torch.randn(2, 2))


def test_without_data_the_range_search_names_the_layer():
    with pytest.raises(QuantizationError, match="mid.to_q.*saw no data"):
        ActivationQuantizer(8, symmetric=False, name="mid.to_q").finish("minmax")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_observing_a_non_finite_value_names_the_layer(bad):
    quantizer = ActivationQuantizer(8, symmetric=False, name="mid.conv.input_quantizer")
    quantizer.mode = Mode.OBSERVE
    with pytest.raises(PTQError, match="mid.conv.input_quantizer"):
        quantizer(torch.tensor([[1.0, bad]]))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([((2, 5), -1), ((2, 3, 5), -1), ((2, 5, 4), -2), ((2, 5, 3, 3), -3), ((5, 3, 3), -3)]),
    st.integers(1, 4),
)
def test_each_segment_of_an_activation_has_its_own_range(shape_and_axis, first):
    shape, axis = shape_and_axis
    quantizer = Quantizer(4, symmetric=False, axis=axis, segments=(first, 5 - first))
    quantizer.set_range(_range([[0.1, 0.5]], [[3.0, 8.0]]))
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(first))
    expected = x.clone().movedim(axis, 0)
    expected[:first] = _grid(expected[:first], 0.1, 3)
    expected[first:] = _grid(expected[first:], 0.5, 8)
    assert torch.allclose(quantizer(x), expected.movedim(0, axis), rtol=0, atol=1e-6)


def test_each_output_channel_and_input_segment_of_a_weight_has_its_own_range():
    weight = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(4, symmetric=False, rows=2, axis=-3, segments=(1, 2))
    scale, zero_point = [[0.1, 0.2], [0.3, 0.4]], [[1.0, 5.0], [9.0, 14.0]]
    quantizer.set_range(_range(scale, zero_point))
    expected = torch.empty_like(weight)
    for row in range(2):
        expected[row, :1] = _grid(weight[row, :1], scale[row][0], zero_point[row][0])
        expected[row, 1:] = _grid(weight[row, 1:], scale[row][1], zero_point[row][1])
    assert torch.allclose(quantizer(weight), expected, rtol=0, atol=1e-6)


def test_minmax_over_several_batches_covers_all_of_them():
    quantizer = ActivationQuantizer(8, symmetric=False)
    quantizer.mode = Mode.OBSERVE
    for batch in (torch.tensor([[0.0, 1.0]]), torch.tensor([[-3.0, 0.5], [2.0, 4.0]])):
        quantizer(batch)
    quantizer.finish("minmax")
    assert quantizer.scale.item() == pytest.approx(7 / 255, rel=1e-3)
    assert quantizer.zero_point.item() == round(3 / (7 / 255))
    assert not quantizer.saw_data


def test_segments_are_observed_apart():
    quantizer = ActivationQuantizer(8, symmetric=False, axis=-3, segments=(2, 1))
    quantizer.mode = Mode.OBSERVE
    quantizer(torch.cat([torch.rand(4, 2, 3, 3), 100 * torch.rand(4, 1, 3, 3)], dim=1))
    quantizer.finish("minmax")
    small, large = quantizer.scale[0].tolist()
    assert small < 1 / 255 * 1.001 < 50 / 255 < large


def test_headroom_widens_the_range_about_zero():
    data = torch.tensor([[-1.0, 3.0]])
    plain, wide = (ActivationQuantizer(8, symmetric=False, headroom=factor) for factor in (1.0, 2.0))
    for quantizer in (plain, wide):
        quantizer.observe(data)
        quantizer.finish("minmax")
    assert torch.equal(wide.scale, 2 * plain.scale) and torch.equal(wide.zero_point, plain.zero_point)
    beyond = torch.tensor([[-1.9, 5.9]])
    torch.testing.assert_close(wide(beyond), beyond, rtol=0, atol=float(wide.scale) / 2 + 1e-6)
    assert float(plain(beyond).max()) < 3.1


def test_its_own_metric_goes_before_that_of_the_run():
    data = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0])])
    scales = {}
    for own in (None, "minmax"):
        quantizer = ActivationQuantizer(4, symmetric=False, metric=own)
        quantizer.mode = Mode.OBSERVE
        quantizer(data[None])
        quantizer.finish("mse")
        scales[own] = quantizer.scale.item()
    assert scales["minmax"] > 1.5 * scales[None]


def test_freezing_bakes_the_weight_once():
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    quantizer = WeightQuantizer(3, symmetric=False, rows=4)
    quantizer.search(weight, "minmax")
    expected = fake_quantize(weight.detach(), *(getattr(quantizer, field) for field in QRange._fields))
    quantizer.freeze(weight)
    assert torch.equal(weight.detach(), expected) and weight.requires_grad
    assert quantizer(weight) is weight
    quantizer.scale.mul_(2)  # a second freeze that quantized again would now show
    quantizer.freeze(weight)
    assert torch.equal(weight.detach(), expected)


def test_a_frozen_weight_is_not_searched_again():
    weight = nn.Parameter(torch.randn(4, 3))
    quantizer = WeightQuantizer(3, symmetric=False, rows=4, name="conv_in.weight_quantizer")
    quantizer.search(weight, "minmax")
    quantizer.freeze(weight)
    with pytest.raises(QuantizationError, match="conv_in.weight_quantizer.*frozen"):
        quantizer.search(weight, "mse")


def test_freezing_an_uncalibrated_weight_is_an_error():
    with pytest.raises(QuantizationError, match="not calibrated"):
        WeightQuantizer(8, symmetric=False, rows=4, name="w").freeze(nn.Parameter(torch.randn(4, 3)))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"]
)
def test_copies_quantize_alike_and_are_independent(clone):
    quantizer = Quantizer(4, symmetric=False, axis=-1, segments=(1, 2))
    quantizer.set_range(_range([[0.1, 0.5]], [[3.0, 8.0]]))
    copied, x = clone(quantizer), torch.randn(6, 3)
    assert torch.equal(copied(x), quantizer(x))
    before = quantizer(x)
    copied.scale.mul_(3)
    assert torch.equal(quantizer(x), before) and not torch.equal(copied(x), before)


def test_the_state_dict_carries_ranges_and_flags():
    weight = nn.Parameter(torch.randn(4, 3))
    source = WeightQuantizer(4, symmetric=True, rows=4)
    source.search(weight, "minmax")
    source.freeze(weight)
    assert set(source.state_dict()) == {"scale", "zero_point", "qmin", "qmax", "calibrated", "frozen"}
    target = WeightQuantizer(4, symmetric=True, rows=4)
    target.load_state_dict(source.state_dict())
    assert target(weight) is weight  # frozen there, hence here
    target.load_state_dict(WeightQuantizer(4, symmetric=True, rows=4).state_dict())
    with pytest.raises(QuantizationError, match="not calibrated"):
        target(weight)


def test_a_gradient_passes_straight_through():
    quantizer = Quantizer(4, symmetric=False)
    quantizer.set_range(_range(0.1, 8.0))
    x = torch.tensor([[0.31, -5.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]
