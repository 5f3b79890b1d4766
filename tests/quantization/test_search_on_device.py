"""The range search computes where its data lie, and waits for the device as often for many channels as for few."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptq_exp.quantization.ranges.range_search import METRICS, RangeSketch, search_range

WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "item"}


class Waits(TorchDispatchMode):
    """Counts operators whose result the host reads."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += name in WAITS
        return function(*args, **(kwargs or {}))


def waits(work):
    with Waits() as seen:
        work()
    return sum(seen.counts.values())


@pytest.mark.parametrize("metric", [*METRICS])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_is_made_on_another_device(metric, symmetric):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    wanted = search_range(weight, 4, symmetric=symmetric, channel_axis=0, metric=metric)
    sketch = RangeSketch(1, device="cpu")
    with torch.device("meta"):  # where everything is made that does not say where
        found = search_range(weight, 4, symmetric=symmetric, channel_axis=0, metric=metric)
        sketch.update(weight.reshape(1, -1))
        sketch.search(4, symmetric, metric)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("metric", [*METRICS])
def test_channels_are_searched_side_by_side(metric):
    def of(channels):
        weight = torch.randn(channels, 200, generator=torch.Generator().manual_seed(0))
        return waits(lambda: search_range(weight, 8, symmetric=False, channel_axis=0, metric=metric))

    few, many = of(2), of(64)
    assert many <= few + 4 and many <= 20
