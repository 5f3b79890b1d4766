"""NaN and infinity are found in whatever numbers are read, wherever they are, without a copy."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from ptq_exp.errors import CheckpointError, DataError
from ptq_exp.storage.finite import bad_values, extremes, is_finite, require_finite

KINDS = [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def numbers(kind, *values):
    if isinstance(kind, torch.dtype):
        return torch.tensor(values, dtype=torch.float64).to(kind).view(-1, 2)
    return np.array(values, kind).reshape(-1, 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_place_of_every_kind(kind):
    assert extremes(numbers(kind, 1, -3, 2, 0)) == (-3, 2) and is_finite(numbers(kind, 1, -3, 2, 0))
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(6):
            values = numbers(kind, *(bad if i == place else i for i in range(6)))
            assert not is_finite(values) and is_finite(values, or_infinite=True) == math.isinf(bad)
            assert bad_values(values) == "NaN or infinity in 1 of 6 values"


@pytest.mark.parametrize("values", [
    np.zeros((0, 3)), torch.zeros(0), np.array([1, 2]), torch.tensor([1, 2]), np.array("text"), torch.tensor([True]),
    np.array([1 + 2j]), torch.zeros(3, device="meta"),
])
def test_what_has_no_real_numbers_is_let_pass(values):
    assert extremes(values) is None and is_finite(values)


def test_eight_bit_numbers_and_views_that_are_not_contiguous():
    values = torch.ones(4, 6)
    values[1, 3] = math.nan
    assert not is_finite(values.T) and not is_finite(values.to(torch.float8_e4m3fn)) and is_finite(values[:, ::2])
    assert not is_finite(values.numpy().T[::3]) and is_finite(torch.ones(3, requires_grad=True))


def test_the_first_by_name_is_reported():
    good, bad = np.ones(3), np.array([1, np.nan, np.inf])
    require_finite({"a": good, "b": torch.ones(2)}, "here", "mend it")
    with pytest.raises(DataError, match="^x.npz: b holds NaN or infinity in 2 of 3 values; mend it$"):
        require_finite({"a": good, "b": bad, "c": bad}, "x.npz", "mend it")
    with pytest.raises(CheckpointError, match="^f: b "):
        require_finite(iter([("a", good), ("b", bad)]), "f", "mend it", CheckpointError)


def test_mapped_files_are_not_loaded(tmp_path):
    np.save(tmp_path / "big.npy", np.ones(4_000_000, np.float32))
    mapped = np.load(tmp_path / "big.npy", mmap_mode="r")
    tracemalloc.start()
    assert is_finite(mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
