"""Range metrics that are a loss of the error: against the closed forms, brute force, and a histogram metric by hand."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import METRICS, HistogramMetric, RangeSketch, search_range
from ptq_exp.quantization.affine import choose_qparams, fake_quantize
from ptq_exp.quantization.ranges.elementwise import ElementwiseErrors, is_convex
from ptq_exp.quantization.ranges.histogram import Histogram
from ptq_exp.quantization.ranges.metrics import HistogramErrors, ValueErrors

POWERS = {"l1": 1.0, "mse": 2.0, "lp": 2.4}


def power(p):
    return lambda e: e.abs().pow(p)


def huber(e, knee=0.5):
    return torch.where(e.abs() < knee, e.square() / 2, knee * (e.abs() - knee / 2))


@pytest.fixture
def registered(monkeypatch):
    return lambda name, metric: monkeypatch.setitem(METRICS, name, metric)


def heavy_tails(n, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) / (torch.rand(n, generator=generator) + 0.1) + shift


def mean_loss(loss, x, qrange):
    return float(loss((x - fake_quantize(x, *qrange)).double()).mean())


@pytest.mark.parametrize("metric", POWERS)
@given(bits=st.sampled_from((2, 3, 4, 8)), seed=st.integers(0, 1000), shift=st.floats(-2, 2), size=st.floats(0.01, 100))
def test_a_loss_of_the_error_gives_the_errors_of_the_closed_form(metric, bits, seed, shift, size):
    p, unit = POWERS[metric], torch.full((2, 1), size)
    rows = torch.stack((heavy_tails(700, seed, shift), heavy_tails(700, seed + 1))) * size
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    shares = torch.tensor([[1.0, 0.3, 1.0, 0.5, 0.9]]), torch.tensor([[1.0, 1.0, 0.2, 0.6, 0.8]])
    grid = choose_qparams(low * shares[0], high * shares[1], bits, symmetric=False)
    closed = ValueErrors(rows, metric, unit).errors(grid) * size**p / rows.shape[1]
    torch.testing.assert_close(ElementwiseErrors(rows, None, power(p)).errors(grid), closed, rtol=1e-3, atol=0)
    histogram = Histogram(2, 512)
    histogram.update(rows)
    first, counts = histogram.occupied()
    edges = histogram.width * torch.arange(first, first + counts.shape[1] + 1)
    closed = HistogramErrors(edges, counts, metric, unit).errors(grid) * size**p
    step = (high - low) / (2**bits - 1)
    found = ElementwiseErrors.of_histogram(edges, counts, power(p), step).errors(grid)
    torch.testing.assert_close(found, closed, rtol=0.03, atol=0)


@pytest.mark.parametrize("metric", POWERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_search_by_the_same_loss_finds_ranges_as_good_as_those_of_the_closed_form(registered, metric, bits):
    loss = power(POWERS[metric])
    registered("own", loss)
    for seed, symmetric in zip(range(2), (True, False), strict=True):
        x = heavy_tails(3000, seed, 0.5)
        found = (search_range(x, bits, symmetric=symmetric, metric=m) for m in ("own", metric))
        own, closed = (mean_loss(loss, x, qrange) for qrange in found)
        assert own == pytest.approx(closed, rel=0.005)
        sketch = RangeSketch(1)
        sketch.update(x[None])
        own, closed = (mean_loss(loss, x, sketch.search(bits, symmetric, m)) for m in ("own", metric))
        assert own == pytest.approx(closed, rel=0.03)


def test_bins_as_wide_as_steps_do_not_hide_the_rounding_error():
    """Bin centres that lie on the levels have no error; what lies around them in the bin has s^2 / 12."""
    edges = torch.arange(-0.5, 16)[None]
    grid = choose_qparams(torch.tensor([[0.0]]), torch.tensor([[15.0]]), 4, symmetric=True)
    assert grid.scale == 1
    source = ElementwiseErrors.of_histogram(edges, torch.ones(1, 16), torch.square, torch.ones(1, 1))
    assert float(source.errors(grid)) == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "convex"),
    [
        (torch.square, True), (huber, True), (lambda e: torch.where(e > 0, 3 * e, -e), True), (torch.log1p, False),
        (lambda e: e.abs().clamp(max=0.2), False), (lambda e: e.abs() > 0.1, False), (lambda e: e.abs().sqrt(), False),
    ],
)
def test_a_loss_is_known_to_be_convex_or_not(loss, convex):
    points = torch.linspace(0.0, 3, 50)[None]
    assert is_convex(lambda e: loss(e.abs() if loss is torch.log1p else e), points) == convex


def test_a_loss_that_is_not_convex_is_searched_as_well(registered):
    """Half of the values near zero, outliers far away: a loss that saturates gives them up, mse does not."""
    def saturating(e):
        return e.square().clamp(max=0.25)

    registered("saturating", saturating)
    x = torch.cat((heavy_tails(2000, 3) * 0.3, torch.tensor([40.0, -25.0])))
    found = mean_loss(saturating, x, search_range(x, 3, symmetric=False, metric="saturating"))
    ends = torch.linspace(0.005, 1, 50)
    best = min(
        mean_loss(saturating, x, choose_qparams(x.amin() * a, x.amax() * b, 3, symmetric=False))
        for a, b in itertools.product(ends, ends)
    )
    assert found <= best * 1.01
    assert found < 0.2 * mean_loss(saturating, x, search_range(x, 3, symmetric=False, metric="mse"))


def test_a_loss_that_counts_large_errors_may_return_truth_values(registered):
    registered("large", lambda e: e.abs() > 0.1)
    x = torch.linspace(-1, 1, 4001)
    by_loss, by_data = (search_range(x, 4, symmetric=False, metric=m) for m in ("large", "minmax"))
    assert by_data.scale * 0.5 < by_loss.scale < 0.2001
    assert mean_loss(lambda e: (e.abs() > 0.1).double(), x, by_loss) == 0


def test_per_channel_and_one_sided_data(registered):
    registered("huber", huber)
    x = torch.stack([heavy_tails(400, seed).abs() * 10.0**seed for seed in range(3)])
    for bits, symmetric in itertools.product((3, 8), (True, False)):
        found = search_range(x, bits, symmetric=symmetric, channel_axis=0, metric="huber")
        by_data = search_range(x, bits, symmetric=symmetric, channel_axis=0, metric="minmax")
        for row in range(3):
            pair = [mean_loss(huber, x[row], [part[row] for part in q]) for q in (found, by_data)]
            assert pair[0] <= pair[1]


@dataclass
class Weighed:
    """Mean Huber loss at the bin centres, as a source of one's own."""

    values: torch.Tensor
    shares: torch.Tensor
    convex: bool = True

    @property
    def cost(self):
        return self.values.numel()

    def errors(self, candidates):
        each = zip(*(part.T for part in candidates), strict=True)
        return torch.stack([self.error(*one) for one in each], 1)

    def error(self, *candidate):
        x = fake_quantize(self.values, *(part[:, None] for part in candidate))
        return (huber(self.values - x) * self.shares).sum(1)


def test_a_metric_of_the_histogram_finds_the_range_of_the_same_loss(registered):
    registered("huber", huber)
    registered("of_histogram", HistogramMetric(
        lambda edges, counts, bits: Weighed((edges[:, 1:] + edges[:, :-1]) / 2, counts / counts.sum(1, keepdim=True))
    ))
    x = heavy_tails(5000, 1)
    one, other = (mean_loss(huber, x, search_range(x, 4, symmetric=False, metric=m)) for m in ("huber", "of_histogram"))
    assert one == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize(
    "metric",
    [lambda edges, counts, bits: edges, lambda e: e, lambda e: e.mean(), lambda e: 1 / e.abs().clamp(max=0), 3.0,
     lambda e: e.square().tolist()],
)
def test_what_is_no_loss_is_refused_in_one_line(registered, metric):
    registered("own", metric)
    with pytest.raises(ConfigError, match=r"^METRICS\['own'\] is no loss of an error[^\n]*$"):
        search_range(torch.randn(10), 4, symmetric=False, metric="own")
