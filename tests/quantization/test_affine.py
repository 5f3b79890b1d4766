"""Affine quantization: integer grids, parameters from range ends, values and gradients of fake_quantize."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import affine
from ptq_exp.quantization.affine import (
    QRange,
    choose_qparams,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
)

GOLDEN = Path(__file__).parents[1] / "golden"

floats = st.floats(-1e4, 1e4, width=32)
vectors = st.lists(floats, min_size=1, max_size=50).map(torch.tensor)
bit_widths = st.integers(2, 8)


def qrange(scale, zero_point, qmin, qmax) -> QRange:
    return QRange(*(torch.tensor(float(value)) for value in (scale, zero_point, qmin, qmax)))


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(2, True, (-2, 1)), (2, False, (0, 3)), (8, True, (-128, 127)), (8, False, (0, 255)), (16, False, (0, 65535))],
)
def test_integer_range(bits, signed, expected):
    assert integer_range(bits, signed) == expected


@pytest.mark.parametrize("bits", [1, 0, -8, 17, 32, 4.0, "8", True, None])
def test_impossible_bits_are_named_with_the_valid_range(bits):
    with pytest.raises(ConfigError, match=r"from 2 to 16") as error:
        integer_range(bits, signed=True)
    assert repr(bits) in str(error.value)


@pytest.mark.parametrize(
    ("low", "high", "bits", "symmetric", "expected"),
    [
        (-1, 2, 2, False, (1, 1, 0, 3)),
        (-1, 2, 3, True, (2 / 3, 0, -4, 3)),
        (-4, 1, 3, True, (1, 0, -4, 3)),
        (0, 30, 4, True, (2, 0, 0, 15)),
        (-30, 0, 4, True, (2, 0, -15, 0)),
        (5, 6, 2, False, (2, 0, 0, 3)),  # zero is included
        (5, 6, 2, True, (2, 0, 0, 3)),
        (-6, -5, 2, False, (2, 3, 0, 3)),
        (-6, -5, 2, True, (2, 0, -3, 0)),
        (-1, 1, 2, False, (2 / 3, 2, 0, 3)),  # zero point 1.5 goes to the even neighbour
    ],
)
def test_parameters_by_hand(low, high, bits, symmetric, expected):
    found = choose_qparams(torch.tensor(float(low)), torch.tensor(float(high)), bits, symmetric)
    torch.testing.assert_close(found, qrange(*expected))
    assert all(part.dtype == torch.float32 and part.shape == () for part in found)


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_range_gives_a_finite_quantizer_of_zero(symmetric):
    found = choose_qparams(torch.zeros(3), torch.zeros(3), 8, symmetric)
    assert (found.scale > 0).all()
    assert torch.equal(fake_quantize(torch.zeros(3), *found), torch.zeros(3))
    assert torch.isfinite(fake_quantize(torch.tensor([1e6, -1e6, 3.0]), *found)).all()


def test_each_channel_gets_the_levels_of_its_own_sign():
    low, high = torch.tensor([[-2.0], [0.0], [-3.0]]), torch.tensor([[1.0], [15.0], [-1.0]])
    found = choose_qparams(low, high, 4, symmetric=True)
    assert found.qmin.tolist() == [[-8], [0], [-15]]
    assert found.qmax.tolist() == [[7], [15], [0]]
    torch.testing.assert_close(found.scale, torch.tensor([[0.25], [1.0], [0.2]]))


def test_values_by_hand_with_ties_to_even():
    x = torch.tensor([-9.0, -1.0, -0.26, -0.25, 0.0, 0.25, 0.75, 0.76, 1.2, 9.0])
    grid = qrange(0.5, 1, 0, 3)
    assert quantize(x, *grid).tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 3]
    assert quantize(x, *grid).dtype == torch.int32
    assert fake_quantize(x, *grid).tolist() == [-0.5, -0.5, -0.5, 0, 0, 0, 1, 1, 1, 1]
    assert dequantize(torch.tensor([0, 1, 3]), grid.scale, grid.zero_point).tolist() == [-0.5, 0, 1]


def test_input_is_left_alone():
    x = torch.linspace(-1, 1, 7)
    before = x.clone()
    fake_quantize(x, *qrange(0.1, 0, -2, 1))
    quantize(x, *qrange(0.1, 0, -2, 1))
    assert torch.equal(x, before)


@settings(deadline=None)
@given(vectors, bit_widths, st.booleans(), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_grid_properties(x, bits, symmetric, shrink_low, shrink_high):
    found = choose_qparams(x.min() * shrink_low, x.max() * shrink_high, bits, symmetric)
    out = fake_quantize(x, *found)
    assert found.qmin <= found.zero_point <= found.qmax
    assert found.zero_point == found.zero_point.round()
    assert len(out.unique()) <= 2**bits
    assert torch.equal(fake_quantize(out, *found), out)
    assert torch.equal(dequantize(quantize(x, *found), found.scale, found.zero_point), out)
    assert fake_quantize(torch.zeros(1), *found) == 0
    low, high = ((level - found.zero_point) * found.scale for level in (found.qmin, found.qmax))
    inside = (x >= low) & (x <= high)
    bound = found.scale / 2 + 1e-6 * x.abs()
    assert ((x - out).abs() <= bound)[inside].all()
    assert torch.equal(out[x > high], high.expand_as(out)[x > high])
    assert torch.equal(out[x < low], low.expand_as(out)[x < low])


@settings(deadline=None)
@given(vectors, bit_widths)
def test_plain_range_clips_no_value_when_symmetric(x, bits):
    found = choose_qparams(x.min(), x.max(), bits, symmetric=True)
    error = (x - fake_quantize(x, *found)).abs()
    assert (error <= found.scale / 2 + 1e-6 * x.abs()).all()


def test_straight_through_gradients_by_hand():
    """Levels -1..2 of scale 0.5: inside, d/dscale = level - x / scale; outside the clamped level, and d/dx = 0."""
    x = torch.tensor([-2.0, -0.6, 0.1, 0.8, 1.2, 3.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    zero_point, qmin, qmax = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(3.0)
    (fake_quantize(x, scale, zero_point, qmin, qmax) * weight).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]
    by_element = torch.tensor([-1.0, -1 + 1.2, 0 - 0.2, 2 - 1.6, 2 - 2.4, 2.0])
    torch.testing.assert_close(scale.grad, (weight * by_element).sum())


def test_kept_elements_pass_and_have_no_part_in_the_gradient_of_the_scale():
    x = torch.tensor([-2.0, -0.6, 0.1, 0.8, 1.2, 3.0], requires_grad=True)
    scale, kept = torch.tensor(0.5, requires_grad=True), torch.tensor([1.0, 1, 0, 0, 0, 1])
    out = fake_quantize(x, scale, *(torch.tensor(v) for v in (1.0, 0.0, 3.0)), kept)
    assert torch.equal(out, torch.tensor([-2, -0.6, 0, 1, 1, 3]))
    (out * torch.arange(1.0, 7.0)).sum().backward()
    assert x.grad.tolist() == [1, 2, 3, 4, 5, 6]
    assert float(scale.grad) == pytest.approx(3 * (0 - 0.2) + 4 * (2 - 1.6) + 5 * (2 - 2.4), abs=1e-6)


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_kept_elements_of_narrower_floats_than_the_scales(shape):
    """As on a GPU: a 0-d scale leaves bfloat16 alone, one for each sample gives float32."""
    x = torch.tensor([[0.3, 0.8], [0.3, 0.8], [0.3, 9.0]], dtype=torch.bfloat16, requires_grad=True)
    scale = torch.full(shape, 0.5, requires_grad=True)
    kept = torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.bfloat16)
    out = fake_quantize(x, scale, *(torch.full(shape, v) for v in (1.0, 0.0, 3.0)), kept)
    exact = x.detach()
    assert out.detach().bfloat16().tolist() == [[exact[0, 0], 1], [0.5, exact[1, 1]], [0.5, 9]]
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.tolist() == [[1, 1], [1, 1], [1, 1]]
    assert scale.grad.shape == shape and float(scale.grad.sum()) == pytest.approx(2 - 1.6 + 2 * (1 - 0.6), abs=0.02)


@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
def test_gradients_match_autograd_through_a_detached_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    scale = 0.2 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    bounds = (torch.full(shape, 2.0), torch.zeros(shape), torch.full(shape, 7.0))
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def composed(x, scale, zero_point, qmin, qmax):
        ratio = x / scale
        level = ratio + (ratio.round() - ratio).detach() + zero_point
        # Not `clamp`: its gradient at the outermost level, where it equals a bound, depends on the version.
        level = torch.where(level < qmin, qmin, torch.where(level > qmax, qmax, level))
        return (level - zero_point) * scale

    gradients = []
    for function in (fake_quantize, composed):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        (function(*leaves, *bounds) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][1].shape == shape


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("shape", "drop"), [((), False), ((), True), ((4, 1), False), ((4, 1), True)])
def test_values_and_gradients_are_the_same_whatever_is_kept_for_them(shape, drop, needs, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 50, generator=generator)
    scale = torch.full(shape, 0.3)
    bounds = [torch.full(shape, value) for value in (3.0, 0.0, 7.0)]
    kept = (torch.rand(x.shape, generator=generator) < 0.3).float() if drop else None
    weight = torch.randn(x.shape, generator=generator)
    found = []
    for few in (0, 1000):
        monkeypatch.setattr(affine, "FEW", few)
        leaves = x.clone().requires_grad_(needs[0]), scale.clone().requires_grad_(needs[1])
        y = fake_quantize(*leaves, *bounds, kept)
        # twice: what is kept must survive the first backward
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(y, wanted, weight, retain_graph=True)
        found.append([y.detach(), *first, *torch.autograd.grad(y, wanted, weight)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(found[1][1], found[1][1 + sum(needs)])


@pytest.mark.parametrize("needs", ["x", "scale"])
def test_training_and_inference_paths_agree_bitwise(needs):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    grid = choose_qparams(x.min() * 0.6, x.max() * 0.7, 5, symmetric=False)
    plain = fake_quantize(x, *grid)
    leaf = {"x": x, "scale": grid.scale}[needs].clone().requires_grad_()
    trained = fake_quantize(leaf, *grid) if needs == "x" else fake_quantize(x, leaf, *grid[1:])
    assert trained.requires_grad
    assert torch.equal(trained, plain)
    with torch.no_grad():
        assert not fake_quantize(leaf if needs == "x" else x, *grid).requires_grad


def test_error_of_every_deployable_reference_quantizer():
    """The mean |x - q(x)|^2.4 that the public implementations report for their own scale and zero point."""
    inputs, table = np.load(GOLDEN / "search_inputs.npz"), np.load(GOLDEN / "search_references.npz")
    per_tensor = table["granularity"] == "pt"
    deployable = (table["zero_point_min"] >= 0) & (table["zero_point_max"] <= 2.0 ** table["bits"] - 1)
    chosen = np.flatnonzero(per_tensor & deployable)
    assert len(chosen) > 100
    for i in chosen:
        x = torch.from_numpy(inputs[table["tensor"][i]])
        grid = qrange(table["scale"][i], table["zero_point_min"][i], 0, 2 ** table["bits"][i] - 1)
        error = (x.double() - fake_quantize(x, *grid).double()).abs().pow(2.4).mean().item()
        assert error == pytest.approx(table["l24"][i], rel=1e-5), (table["impl"][i], table["tensor"][i])


def test_the_package_exports_the_function_and_not_a_module_of_its_name():
    import ptq_exp.quantization

    assert ptq_exp.quantization.quantize is quantize
