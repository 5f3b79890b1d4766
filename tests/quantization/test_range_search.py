"""Range search: brute force for every metric, edge cases, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization.affine import QRange, choose_qparams, fake_quantize
from ptq_exp.quantization.ranges.range_search import METRICS, RangeSketch, search_range

POWERS = {"mse": 2.0, "l1": 1.0, "lp": 2.4}
SEARCHED = ("mse", "l1", "lp", "cosine", "kl")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(900, generator=generator)
    rare = torch.rand(900, generator=generator) < 0.01
    return {
        "normal": normal,
        "silu": torch.nn.functional.silu(1.6 * normal + 0.2),
        "relu": normal.relu(),
        "offset": 5 + torch.rand(900, generator=generator),
        "skewed": torch.exp(normal) - 0.5,
        "outliers": torch.where(rare, 20 * normal, normal),
        "few": normal[:20],
    }


TENSORS = tensors()


def divergence(x: np.ndarray, found: QRange) -> float:
    """KL of the histogram (zero-aligned bins, a power of two of them up to 4 sqrt(n)) from its code-wise mean."""
    bins = min(2048, 2 ** math.floor(math.log2(4 * math.isqrt(len(x)))))
    width = 2.0 ** np.frexp(np.abs(x).max())[1] / (bins / 2)
    number, counts = np.unique(np.floor(x[x != 0] / width), return_counts=True)
    low, high = float(found.qmin - found.zero_point), float(found.qmax - found.zero_point)
    code = np.clip(np.floor((number + 0.5) * width / float(found.scale) + 0.5), low, high)
    _, member = np.unique(code, return_inverse=True)
    share = counts / counts.sum()
    mean = (np.bincount(member, weights=share) / np.bincount(member))[member]
    return float((share * np.log(share / mean)).sum())


def achieved(x: torch.Tensor, found: QRange, metric: str) -> float:
    """The metric by its definition, in float64."""
    if metric == "kl":
        return divergence(x.double().numpy(), found)
    x, q = x.double(), fake_quantize(x, *found).double()
    if metric == "cosine":
        return float(1 - (x @ q) / (x.norm() * q.norm()))
    return float((x - q).abs().pow(POWERS[metric]).mean())


def brute_force(x: torch.Tensor, bits: int, symmetric: bool, metric: str) -> float:
    low, high = x.min(), x.max()
    if symmetric:
        ends = [(low * r, high * r) for r in np.linspace(0.01, 1, 100)]
    else:
        steps = np.linspace(0.04, 1, 11)
        ends = [(low * a, high * b) for a in (steps if low < 0 else [1]) for b in (steps if high > 0 else [1])]
    return min(achieved(x, choose_qparams(*pair, bits, symmetric), metric) for pair in ends)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("metric", SEARCHED)
def test_every_metric_is_minimised(metric, bits, symmetric):
    for name in ("normal", "silu", "relu", "skewed", "outliers", "few"):
        x = TENSORS[name]
        found = search_range(x, bits, symmetric=symmetric, metric=metric)
        assert achieved(x, found, metric) <= brute_force(x, bits, symmetric, metric) * 1.002 + 1e-9, name


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_one_value_far_out_does_not_hide_the_others(symmetric):
    """One value 300 times as far out as the rest: the least l1 error gives it up, far below the first grid."""
    x = torch.cat((torch.randn(2000, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0])))
    found = search_range(x, 8, symmetric=symmetric, metric="l1")
    ends = [choose_qparams(x.min(), torch.tensor(high), 8, symmetric) for high in np.geomspace(1, 1000, 300)]
    assert achieved(x, found, "l1") <= min(achieved(x, grid, "l1") for grid in ends) * 1.001
    assert float(found.scale * (found.qmax - found.zero_point)) < 10


@pytest.mark.parametrize("metric", SEARCHED)
def test_each_metric_beats_the_others_on_its_own_terms(metric):
    """... by a margin that a search blind to the metric would not have."""
    x = TENSORS["normal"]
    errors = {m: achieved(x, search_range(x, 3, symmetric=False, metric=m), metric) for m in METRICS}
    own = errors.pop(metric)
    assert own <= min(errors.values()) * (1 + 1e-6)
    assert own < 0.99 * errors["minmax"]
    assert sum(own < 0.999 * error for error in errors.values()) >= 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_and_percentile_by_definition(symmetric):
    x = torch.randn(30000, generator=torch.Generator().manual_seed(0)).reshape(2, -1)
    for axis in (None, 0):
        rows = x.reshape(1, -1) if axis is None else x
        plain = choose_qparams(rows.amin(1), rows.amax(1), 6, symmetric)
        found = search_range(x, 6, symmetric=symmetric, channel_axis=axis, metric="minmax")
        assert torch.equal(found.scale.flatten(), plain.scale)
        ends = [np.quantile(sign * rows.numpy(), 0.9999, axis=1, method="inverted_cdf") for sign in (-1, 1)]
        expected = choose_qparams(-torch.from_numpy(ends[0]), torch.from_numpy(ends[1]), 6, symmetric)
        found = search_range(x, 6, symmetric=symmetric, channel_axis=axis, metric="percentile")
        torch.testing.assert_close(found.scale.flatten(), expected.scale)
        assert (found.scale.flatten() < plain.scale).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_tensors_are_reproduced(metric, symmetric):
    x = torch.tensor([3.7, -0.02, 0.0, 1e-20, -3e20])[:, None].expand(5, 50)
    sketch = RangeSketch(5)
    sketch.update(x)
    streamed = QRange(*(part[:, None] for part in sketch.search(4, symmetric, metric)))
    for found in (search_range(x, 4, symmetric=symmetric, channel_axis=0, metric=metric), streamed):
        assert all(torch.isfinite(part).all() for part in found)
        torch.testing.assert_close(fake_quantize(x, *found), x, rtol=1e-6, atol=1e-12)
        assert torch.equal(fake_quantize(torch.zeros(5, 1), *found), torch.zeros(5, 1))


@pytest.mark.parametrize("metric", METRICS)
def test_channels_without_data_spread_do_not_disturb_the_others(metric):
    """An all-zero, an all-positive and an all-negative channel beside an ordinary one."""
    normal = torch.randn(200, generator=torch.Generator().manual_seed(1))
    x = torch.stack([torch.zeros(200), normal.abs(), -normal.abs(), normal])
    found = search_range(x, 4, symmetric=True, channel_axis=0, metric=metric)
    assert all(torch.isfinite(part).all() for part in found)
    assert torch.equal(fake_quantize(x, *found)[0], x[0])
    assert found.qmin.flatten()[1:].tolist() == [0, -15, -8]
    assert found.qmax.flatten()[1:].tolist() == [15, 0, 7]
    torch.testing.assert_close(found.scale[1], found.scale[2])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_offset_data_keeps_zero_exact_and_uses_the_levels_it_has(bits):
    x = TENSORS["offset"]
    found = search_range(x, bits, symmetric=False)
    assert fake_quantize(torch.zeros(1), *found) == 0
    assert found.zero_point == 0
    assert (x - fake_quantize(x, *found)).abs().max() <= 6.0 / (2**bits - 1)


def test_shapes_fit_the_tensor_and_negative_axes_count_from_the_end():
    x = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    assert all(part.shape == () for part in search_range(x, 8, symmetric=True))
    for axis, shape in ((0, (4, 1, 1, 1)), (1, (1, 3, 1, 1)), (-1, (1, 1, 1, 2))):
        found = search_range(x, 8, symmetric=False, channel_axis=axis)
        assert all(part.shape == shape and part.dtype == torch.float32 for part in found)
        assert fake_quantize(x, *found).shape == x.shape
        first = search_range(x.movedim(axis, 0), 8, symmetric=False, channel_axis=0)
        assert torch.equal(found.scale.flatten(), first.scale.flatten())


def test_parameters_need_no_gradient_and_stay_as_they_are():
    weight = torch.nn.Parameter(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    assert not any(part.requires_grad for part in search_range(weight, 4, symmetric=True, channel_axis=0))
    assert torch.equal(weight, before)


@settings(deadline=None, max_examples=20)
@given(st.integers(-20, 20), st.sampled_from(tuple(METRICS)), st.booleans())
def test_scaling_by_a_power_of_two_scales_the_result_exactly(exponent, metric, symmetric):
    x = TENSORS["silu"][:600]
    one = search_range(x, 5, symmetric=symmetric, metric=metric)
    other = search_range(x * 2.0**exponent, 5, symmetric=symmetric, metric=metric)
    assert torch.equal(other.scale, one.scale * 2.0**exponent)
    assert torch.equal(other.zero_point, one.zero_point)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40).map(torch.tensor),
    st.sampled_from(tuple(METRICS)),
    st.sampled_from([2, 5, 8, 16]),
    st.booleans(),
)
def test_any_finite_tensor_gives_a_usable_quantizer(x, metric, bits, symmetric):
    sketch = RangeSketch(1)
    sketch.update(x[None])
    streamed = QRange(*(part[0] for part in sketch.search(bits, symmetric, metric)))
    for found in (search_range(x, bits, symmetric=symmetric, metric=metric), streamed):
        assert all(torch.isfinite(part) for part in found)
        assert found.scale > 0 and found.qmin <= found.zero_point <= found.qmax
        assert found.qmax - found.qmin == 2**bits - 1
        assert fake_quantize(torch.zeros(1), *found) == 0
        assert torch.isfinite(fake_quantize(x, *found)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_name_the_layer(bad):
    x = torch.zeros(3, 10)
    x[1, 4] = bad
    with pytest.raises(QuantizationError, match=r"down\.0\.conv1.*1 (NaN|infinite)"):
        search_range(x, 8, symmetric=True, channel_axis=0, name="down.0.conv1")
    with pytest.raises(QuantizationError, match=r"down\.0\.conv1"):
        RangeSketch(3, name="down.0.conv1").update(x)


def test_impossible_settings_name_the_valid_ones():
    x = torch.ones(2, 3)
    with pytest.raises(ConfigError, match="mse, l1, cosine, kl, lp, minmax, percentile"):
        search_range(x, 8, symmetric=True, metric="mes")
    with pytest.raises(ConfigError, match="from 2 to 16"):
        search_range(x, 1, symmetric=True)
    with pytest.raises(ConfigError, match="channel_axis=2"):
        search_range(x, 8, symmetric=True, channel_axis=2)
    with pytest.raises(QuantizationError, match="empty"):
        search_range(x[:0], 8, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("metric", SEARCHED)
def test_sketch_search_is_close_to_the_search_on_all_values(metric, symmetric, bits=5):
    for name in ("silu", "relu", "offset", "outliers"):
        x, sketch = TENSORS[name], RangeSketch(1)
        for batch in x.split(250):
            sketch.update(batch[None])
        streamed = QRange(*(part[0] for part in sketch.search(bits, symmetric, metric)))
        exact = search_range(x, bits, symmetric=symmetric, metric=metric)
        error = achieved(x, exact, metric)
        assert achieved(x, streamed, metric) <= error * 1.03 + 1e-9, name
