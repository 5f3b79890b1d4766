"""The least numbers of each row: those that a stable sort begins with."""

import pytest
import torch

from ptq_exp.quantization.ranges.candidates import least

SHAPES = [(24, 1000, 2), (72, 300, 8), (1, 60_000, 1), (3, 20, 8), (2, 9000, 9)]


@pytest.mark.parametrize(("rows", "n", "width"), SHAPES)
@pytest.mark.parametrize("levels", [None, 1000, 20, 1])
def test_least_is_the_beginning_of_a_stable_sort(rows, n, width, levels):
    errors = torch.rand(rows, n, generator=torch.Generator().manual_seed(n))
    if levels:  # equal ones
        errors = (errors * levels).round()
    errors[0, 3], errors[-1, 5] = torch.nan, torch.inf
    found, places = least(errors, width)
    wanted = errors.sort(dim=1, stable=True)
    assert torch.equal(places, wanted.indices[:, :width])
    assert torch.equal(found, wanted.values[:, :width])


def test_with_nan_alone_but_one_the_first_are_taken():
    errors = torch.full((1, 10_000), torch.nan)
    errors[0, 7] = 1.0
    assert least(errors, 3)[1].tolist() == [[7, 0, 1]]
