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


@pytest.mark.parametrize(("n", "width"), [(300, 8), (6000, 8), (9000, 9)])
def test_a_row_of_nan_does_not_hide_the_equal_ones_of_another(n, width):
    draw = torch.Generator().manual_seed(n)
    errors = 1 + torch.rand(9000 // n + 1, n, generator=draw)
    errors[0] = torch.nan  # `width` too few
    errors[0, n // 2] = 1
    errors[1, torch.randperm(n, generator=draw)[: 2 * width]] = 0.5  # `width` too many
    assert torch.equal(least(errors, width)[1], errors.sort(dim=1, stable=True).indices[:, :width])
