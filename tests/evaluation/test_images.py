"""uint8 conversion at its edges, PSNR by hand, and where every image lands in the grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.errors import DataError
from ptq_exp.evaluation import from_uint8, image_grid, mean_psnr, psnr, to_uint8


def one_value(value):
    return torch.full((1, 1, 1, 1), float(value))


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1, 0), (1, 255), (-7, 0), (7, 255), (1 / 255, 128), (-1 / 255, 127), (0.999, 255), (0.996, 254)],
)
def test_levels_are_rounded_and_clamped(value, level):
    assert to_uint8(one_value(value)).item() == level


@given(st.floats(-1, 1, width=32))
def test_rounding_error_is_at_most_half_a_level(value):
    assert abs(to_uint8(one_value(value)).item() - (value + 1) * 127.5) <= 0.5


def test_every_level_survives_the_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_uint8(from_uint8(images)), images)
    assert from_uint8(images).min() == -1 and from_uint8(images).max() == 1


def test_layout_is_nhwc_and_half_precision_is_accepted():
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    images = to_uint8(x)
    assert images.shape == (2, 4, 5, 3) and images.dtype == np.uint8
    assert images[1, 2, 3, 0] == round((x[1, 0, 2, 3].item() + 1) * 127.5)
    assert from_uint8(images).shape == x.shape
    assert np.abs(to_uint8(x.bfloat16()).astype(int) - images).max() <= 1
    assert np.array_equal(to_uint8(x.numpy()), images)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_image_is_named(bad):
    x = torch.zeros(5, 1, 2, 2)
    x[3, 0, 1, 1] = bad
    with pytest.raises(DataError, match="1 of 5 images, the first is image 3"):
        to_uint8(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4, 4), "shape"),
        (torch.zeros(2, 4, 4, 3), "shape"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "float"),
    ],
)
def test_wrong_tensors_are_data_errors(x, message):
    with pytest.raises(DataError, match=message):
        to_uint8(x)


def test_psnr_by_hand():
    a = np.zeros((3, 2, 2, 1), np.uint8)
    b = a.copy()
    b[1, 0, 0, 0] = 10  # MSE 25
    b[2] = 255  # MSE 255^2
    values = psnr(a, b)
    assert values[0] == math.inf
    assert values[1:] == pytest.approx([10 * math.log10(255**2 / 25), 0.0])


def test_mean_psnr_counts_identical_pairs_at_the_largest_finite_value():
    a = np.zeros((2, 16, 16, 1), np.uint8)
    b = a.copy()
    b[1, 0, 0, 0] = 1  # the smallest difference there is
    cap = 10 * math.log10(255**2 * 256)
    assert psnr(a, b)[1] == pytest.approx(cap) and cap == pytest.approx(72.2, abs=0.05)
    assert mean_psnr(a, b) == pytest.approx(cap)
    b[1] = 255
    assert mean_psnr(a, b) == pytest.approx(cap / 2)


def test_psnr_refuses_floats_other_shapes_and_nothing():
    a = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(DataError, match="uint8"):
        psnr(a, a.astype(np.float32))
    with pytest.raises(DataError, match="differ"):
        psnr(a, a[:1])
    with pytest.raises(DataError, match="at least one pair"):
        mean_psnr(a[:0], a[:0])


def test_grid_places_each_pair_in_one_column_fp_above_quantized():
    count, columns, side, padding = 5, 3, 2, 1
    fp = np.stack([np.full((side, side, 1), 10 * i + 10, np.uint8) for i in range(count)])
    q = fp + 5
    grid = image_grid(fp, q, columns, tile=4, padding=padding)
    enlarged = 4
    assert grid.shape == (4 * (enlarged + padding) + padding, columns * (enlarged + padding) + padding, 3)
    for i in range(count):
        left = padding + (i % columns) * (enlarged + padding)
        for images, offset in ((fp, 0), (q, 1)):
            top = padding + (2 * (i // columns) + offset) * (enlarged + padding)
            assert (grid[top : top + enlarged, left : left + enlarged] == images[i, 0, 0, 0]).all()
    covered = 2 * count * enlarged**2
    assert (grid[..., 0] == 255).sum() == grid[..., 0].size - covered  # everything else is white


def test_grid_keeps_large_colour_images_and_few_columns():
    images = np.random.default_rng(0).integers(0, 200, (2, 80, 70, 3), dtype=np.uint8)
    grid = image_grid(images, images, columns=8, padding=4)
    assert grid.shape == (2 * 84 + 4, 2 * 74 + 4, 3)
    assert np.array_equal(grid[4:84, 78:148], images[1])


@pytest.mark.parametrize(("count", "columns"), [(0, 4), (2, 0)])
def test_grid_of_nothing_is_an_error(count, columns):
    images = np.zeros((count, 4, 4, 1), np.uint8)
    with pytest.raises(DataError, match="image_grid needs"):
        image_grid(images, images, columns)
