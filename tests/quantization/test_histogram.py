"""Streaming sketch: independent of order and split, bounded in memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization.ranges.range_search import METRICS, RangeSketch


def states_equal(one: RangeSketch, other: RangeSketch) -> bool:
    keys = ("min", "max", "counts", "zeros", "count", "exponent")
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in keys)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_sketch_depends_on_the_multiset_of_values_alone(data):
    """Any permutation, split differently into batches, gives the same state, bit for bit."""
    values = st.one_of(st.floats(-1e3, 1e3, width=32), st.floats(-(2.0**-20), 2.0**-20, width=32), st.just(0.0))
    rows = data.draw(st.lists(st.tuples(values, values), min_size=2, max_size=60))
    shuffled = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    once, pieces = RangeSketch(2), RangeSketch(2)
    once.update(torch.tensor(rows).T)
    for batch in np.split(np.array(shuffled, dtype=np.float32), cuts):
        pieces.update(torch.from_numpy(batch).T)
    assert states_equal(once, pieces)


@pytest.mark.parametrize("metric", METRICS)
def test_ranges_do_not_depend_on_the_order_of_the_batches(metric):
    """The widest batch first or last: no batch weighs more than another, and every bit agrees."""
    batches = [10.0**k * torch.randn(1, 300, generator=torch.Generator().manual_seed(k)) for k in range(-2, 3)]
    found = []
    for order in (batches, batches[::-1]):
        sketch = RangeSketch(1)
        for batch in order:
            sketch.update(batch)
        found.append(sketch.search(4, False, metric))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sketch_counts_what_it_saw():
    x = torch.tensor([[-1.0, 0.0, 0.25, 3.0], [0.0, 0.0, -7.0, -0.5]])
    sketch = RangeSketch(2)
    sketch.update(x)
    sketch.update(x[:, :0])
    sketch.update(1000 * x[:, 3:])
    assert sketch.min.tolist() == [-1, -500] and sketch.max.tolist() == [3000, 0]
    assert sketch.count.tolist() == [5, 5]
    assert sketch.zeros.tolist() == [1, 2]
    assert (sketch.counts.sum(1) + sketch.zeros).tolist() == [5, 5]
    zero = sketch.counts.shape[1] // 2
    assert sketch.width.flatten().tolist() == [4096 / zero, 512 / zero]  # the powers of two above 3000 and 500
    filled = {int(j) - zero: int(sketch.counts[0, j]) for j in sketch.counts[0].nonzero()}
    assert filled == {-1: 1, 0: 1, 3: 1, 3000: 1}  # -1, 0.25, 3, 3000 in bins of width 1


def test_sketch_memory_stays_bounded():
    sketch = RangeSketch(2)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for k in range(5):
        sketch.update(10.0**k * torch.randn(2, 3000, generator=generator))
        sizes.append(sum(v.numel() * v.element_size() for v in vars(sketch).values() if isinstance(v, torch.Tensor)))
    assert len(set(sizes)) == 1
    assert sizes[0] <= 2 * 70_000


def test_sketch_percentile_is_exact_to_a_bin():
    x = torch.randn(1, 40000, generator=torch.Generator().manual_seed(0))
    sketch = RangeSketch(1)
    sketch.update(x)
    low, high = sketch.percentile(0.999)
    expected = [np.quantile(x.numpy(), q, method="inverted_cdf") for q in (0.001, 0.999)]
    assert abs(float(low) - expected[0]) <= 2 * float(sketch.width)
    assert abs(float(high) - expected[1]) <= 2 * float(sketch.width)
    assert [float(end) for end in sketch.percentile(1.0)] == [float(x.min()), float(x.max())]


def test_sketch_refuses_what_it_cannot_use():
    with pytest.raises(QuantizationError, match=r"mid\.attn.*no data"):
        RangeSketch(1, name="mid.attn").search(8, True, "lp")
    with pytest.raises(QuantizationError, match=r"expected \[2, n\]"):
        RangeSketch(2).update(torch.zeros(3, 4))
    sketch = RangeSketch(1)
    sketch.update(torch.ones(1, 1))
    with pytest.raises(ConfigError, match="percentile"):
        sketch.search(8, True, "entropy")
