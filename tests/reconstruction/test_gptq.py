"""GPTQ's rounding of one weight: golden numbers of reference programs, exact optima, and inputs that break others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization import WeightQuantizer, choose_qparams
from ptq_exp.reconstruction import gptq, gptq_rounding

GOLDEN = Path(__file__).parents[1] / "golden" / "kit"
SETTINGS = ("b4_sym", "b4_asym", "b3_asym", "b2_asym_damp10", "b8_sym", "b4_asym_act", "b4_asym_g64_static",
            "b4_asym_g64_static_act", "b3_sym_g64_static_act")


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def parameters(weight, bits: int, symmetric: bool, group: int):
    """Scale and zero point [out, groups] on 0..2^b - 1 as the reference chooses them, from all of a group."""
    parts = weight.double().unflatten(1, (-1, group if group > 0 else weight.shape[1]))
    lo, hi = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = torch.where(lo < 0, -hi, lo)
    scale = (hi - lo) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-lo / scale).round()
    return scale, zero


def objective(weight, rounded, hessian) -> float:
    error = weight.double().flatten(1) - rounded.double().flatten(1)
    return float(((error @ hessian) * error).sum())


@pytest.fixture(scope="module")
def data():
    return golden("gptq.npz")


@pytest.mark.parametrize("name", SETTINGS)
def test_reference(data, name):
    weight, x = data["w"].double(), data["x"].double()
    hessian = x.T @ x
    bits, symmetric, group, act_order, _ = data[f"{name}/params"].tolist()
    live = hessian.diagonal() > 0
    ranged = weight if group < 0 else weight * live  # the reference clears a dead column before it ranges groups
    scale, zero = parameters(ranged, bits, bool(symmetric), group)
    damping = float(data[f"{name}/damp"])
    rounded = gptq(weight, hessian, scale, zero, bits, act_order=bool(act_order), damping=damping)
    torch.testing.assert_close(rounded[:, live], data[f"{name}/Q"].double()[:, live], rtol=1e-5, atol=1e-5)
    assert objective(weight, rounded, hessian) == pytest.approx(float(data[f"{name}/objective"]), rel=1e-6)
    # any positive multiple of the Hessian is the same problem; float32 gives float32
    again = gptq(weight.float(), 7e-3 * hessian, scale, zero, bits, act_order=bool(act_order), damping=damping)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.double(), rounded, rtol=1e-6, atol=1e-6)


def test_static_groups_beat_stale_and_fresh_ones(data):
    """In any order of columns; the update with the inverse itself is worse than with its factor."""
    static = float(data["b4_asym_g64_static_act/objective"])
    assert static < 0.5 * min(float(data[f"b4_asym_g64_{kind}/objective"]) for kind in ("stale", "fresh"))
    assert float(data["b4_asym/objective"]) < 0.5 * float(data["wrong_no_cholesky/objective"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("point", [None, torch.zeros(20, 2)])
def test_symmetric_groups(bits, point):
    data = golden("gptq_symmetric_groups.npz")
    weight, x = data["w"].double(), data["x"].double()
    hessian = 2 / len(x) * x.T @ x
    live = hessian.diagonal() > 0
    scale = weight.unflatten(1, (-1, 64)).abs().amax(2) / (2 ** (bits - 1) - 1)
    rounded = gptq(weight, hessian, scale, point, bits, act_order=True)
    torch.testing.assert_close(rounded[:, live], data[f"b{bits}/Q"].double()[:, live], rtol=1e-5, atol=1e-5)
    assert objective(weight, rounded, hessian) == pytest.approx(float(data[f"b{bits}/objective"]), rel=1e-6)


def test_convolution(data):
    weight, x = data["conv/w"], data["conv/x"]
    patches = torch.nn.functional.unfold(x, 3, stride=int(data["conv/stride"]), padding=int(data["conv/padding"]))
    patches = patches.transpose(1, 2).flatten(0, 1)
    hessian = 2 / len(x) * patches.T @ patches
    scale, zero = parameters(weight.flatten(1), 4, False, -1)
    rounded = gptq(weight, hessian, scale, zero, 4)
    torch.testing.assert_close(rounded, data["conv/Q"], rtol=1e-5, atol=1e-5)
    assert objective(weight, rounded, hessian) == pytest.approx(float(data["conv/objective"]), rel=1e-6)


def test_tiny_problem_between_rounding_and_the_optimum(data):
    weight, hessian = data["tiny/w"], data["tiny/H"]
    scale, zero = data["tiny/scale"][:, None], data["tiny/zero"][:, None]
    rounded = gptq(weight, hessian, scale, zero, 2)
    torch.testing.assert_close(rounded, data["tiny/Q_gptq"], rtol=1e-6, atol=1e-6)
    for row in range(len(weight)):
        best = objective(weight[row : row + 1], data["tiny/Q_optimum"][row : row + 1], hessian)
        found = objective(weight[row : row + 1], rounded[row : row + 1], hessian)
        assert best == pytest.approx(float(data["tiny/optimum"][row])) and found >= best - 1e-9


def plain_elimination(weight, hessian, scale, lowest, highest, damping=0.01):
    """GPTQ without any factor: H^-1 itself loses one row and column after the other."""
    n = len(hessian)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(n).double())
    weight, levels = weight.clone(), torch.empty_like(weight)
    for j in range(n):
        levels[:, j] = (weight[:, j] / scale).round().clamp(lowest, highest)
        error = (weight[:, j] - levels[:, j] * scale) / inverse[j, j]
        weight[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
        weight[:, j] = levels[:, j] * scale
    return levels * scale[:, None]


def random_case(out=7, columns=150, rows=400, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw).double() @ torch.randn(columns, columns, generator=draw).double()
    return torch.randn(out, columns, generator=draw).double(), x.T @ x


def test_equals_elimination_without_a_factor():
    """Over more columns than are updated in one go."""
    weight, hessian = random_case()
    scale = weight.abs().amax(1) / 7
    rounded = gptq(weight, hessian, scale[:, None], torch.full((7, 1), 8.0), 4)
    torch.testing.assert_close(rounded, plain_elimination(weight, hessian, scale, -8, 7), rtol=0, atol=1e-9)


def test_dead_input_keeps_its_nearest_rounding(data):
    """Clearing it, as public code does, is an error as soon as a later step feeds it."""
    weight, x = data["w"].double(), data["x"].double()
    hessian = x.T @ x
    dead = hessian.diagonal() == 0
    assert int(dead.sum()) == 1
    scale, zero = parameters(weight, 4, False, -1)
    for act_order in (False, True):
        rounded = gptq(weight, hessian, scale, zero, 4, act_order=act_order)[:, dead]
        nearest = ((weight[:, dead] / scale + zero).round().clamp(0, 15) - zero) * scale
        assert bool(rounded.any()) and torch.equal(rounded, nearest)
    nothing = gptq(weight, torch.zeros_like(hessian), scale, zero, 4)
    torch.testing.assert_close(nothing, ((weight / scale + zero).round().clamp(0, 15) - zero) * scale)


def test_one_sided_groups_use_all_levels():
    """A group of nothing but positive (or negative) weights is not cut in half."""
    weight, hessian = random_case()
    for sign in (1, -1):
        one_sided = sign * weight.abs()
        scale = one_sided.abs().amax(1, keepdim=True) / 255
        rounded = gptq(one_sided, hessian, scale, None, 8)
        assert objective(one_sided, rounded, torch.eye(150).double()) < 1e-3 * float(one_sided.square().sum())


def test_positive_semi_definite_hessians_get_more_damping():
    """Two samples for 150 inputs, and inputs that are all the same."""
    weight, _ = random_case()
    scale = weight.abs().amax(1, keepdim=True) / 7
    x = torch.randn(2, 150, generator=torch.Generator().manual_seed(1)).double()
    for inputs in (x, torch.ones(5, 150).double()):
        hessian = inputs.T @ inputs
        for damping in (0.0, 0.01):
            rounded = gptq(weight, hessian, scale, None, 4, damping=damping)
            nearest = gptq(weight, torch.zeros_like(hessian), scale, None, 4)
            assert objective(weight, rounded, hessian) < 0.5 * objective(weight, nearest, hessian)


def test_groups_of_the_project_fit():
    """Ranges of `WeightQuantizer`, in the terms of `gptq`."""
    weight, hessian = random_case()
    quantizer = WeightQuantizer(4, symmetric=False, rows=7, axis=-1, segments=(50, 50, 50), name="layer")
    quantizer.search(weight.float(), "mse")
    found = gptq(weight, hessian, quantizer.scale, quantizer.zero_point - quantizer.qmin, 4, act_order=True)
    layer = torch.nn.Parameter(found.float(), requires_grad=False)
    assert quantizer.off_grid(layer) == 0
    plain = quantizer(weight.float()).double()
    assert objective(weight, found, hessian) < 0.5 * objective(weight, plain, hessian)


def test_types_and_shapes():
    weight, hessian = random_case()
    scale, zero = choose_qparams(weight.amin(), weight.amax(), 4, False)[:2]
    assert gptq(weight, hessian, scale, zero, 4).shape == weight.shape  # one range for all
    kernel = weight.view(7, 6, 5, 5)
    assert torch.equal(gptq(kernel, hessian, scale, zero, 4).flatten(1), gptq(weight, hessian, scale, zero, 4))
    assert gptq(weight.bfloat16(), hessian.float(), scale, zero, 4).dtype == torch.bfloat16
    with pytest.raises(DataError, match="Hessian"):
        gptq(weight, hessian[:10, :10], scale, zero, 4)
    with pytest.raises(DataError, match="groups"):
        gptq(weight, hessian, torch.ones(7, 149), torch.ones(7, 149), 4)
    with pytest.raises(DataError, match="broadcast"):
        gptq(weight, hessian, torch.ones(6, 1), torch.ones(6, 1), 4)
    with pytest.raises(DataError, match="NaN"):
        gptq(weight, hessian * torch.nan, scale, zero, 4)
    with pytest.raises(QuantizationError, match="Cholesky"):
        gptq(weight, -hessian, scale, zero, 4)


def test_squared_errors_of_weights_of_any_size_are_finite_and_have_the_same_digits():
    """Products are taken in float32, which holds no square of 1e20 or 1e-25."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 90, 40, generator=generator, dtype=torch.float64)
    hessian = rows.mT @ rows
    known = gptq_rounding.objective(error, hessian)
    assert known == pytest.approx(float((rows @ error.mT).square().sum()), rel=1e-5)
    for power in (-83, -1, 3, 70):
        for of_hessian in (0, -100, 100):
            found = gptq_rounding.objective(error * 2.0**power, hessian * 2.0**of_hessian)
            assert found == known * 2.0 ** (2 * power + of_hessian)
    assert gptq_rounding.objective(error * 0, hessian) == gptq_rounding.objective(error, hessian * 0) == 0.0
