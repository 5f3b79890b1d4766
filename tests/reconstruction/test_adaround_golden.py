"""AdaRound against numbers of a public implementation (4 and 8 bits, convolution and linear, symmetric per channel)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.quantization import QRange, WeightQuantizer
from ptq_exp.reconstruction import Annealing, Rounding, reconstruction_loss, rectified_sigmoid, regulariser

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "adaround.npz")
CASES = ["b4_conv", "b4_lin", "b8_conv", "b8_lin"]
SCHEDULES = sorted({key.split("/")[0] for key in GOLDEN.files if key.startswith("sched_")})


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(np.array(GOLDEN[key]))


def rounding(case: str) -> Rounding:
    w, bits = tensor(f"{case}/w"), int(case[1])
    quantizer = WeightQuantizer(bits, symmetric=False, rows=len(w), axis=1 - w.ndim)
    columns = [tensor(f"{case}/{key}").reshape(-1, 1) for key in ("delta", "zp")]
    quantizer.set_range(QRange(*columns, torch.tensor(0.0), torch.tensor(2.0**bits - 1)))
    return Rounding([w], [quantizer])


def set_v(rounded: Rounding, case: str) -> None:
    with torch.no_grad():
        rounded.v.copy_(tensor(f"{case}/V").reshape(-1))


@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_the_full_precision_weight_and_rounds_to_nearest(case):
    start = rounding(case)
    expected = tensor(f"{case}/alpha0")
    # float noise of a fractional part near 1 is magnified by the logarithm
    torch.testing.assert_close(start.v.view_as(expected), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(start.hard()[0], tensor(f"{case}/w_hard0"))
    # halves (the largest weight of a symmetric channel): V >= 0 rounds up, the nearest level is the even one
    ratio = tensor(f"{case}/w") / tensor(f"{case}/delta")
    half = (ratio - ratio.floor() - 0.5).abs() < 1e-4
    assert half.sum() <= len(ratio) and torch.equal(start.hard()[0][~half], tensor(f"{case}/w_nearest")[~half])
    (soft,) = start.soft(start.h())
    levels = 2 ** int(case[1]) - 1
    delta, zero = tensor(f"{case}/delta"), tensor(f"{case}/zp")
    clipped = tensor(f"{case}/w").clamp(-zero * delta, (levels - zero) * delta)
    torch.testing.assert_close(soft, clipped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_h_and_weights_of_any_v(case):
    rounded = rounding(case)
    set_v(rounded, case)
    torch.testing.assert_close(rounded.h().view_as(tensor(f"{case}/h_V")), tensor(f"{case}/h_V"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rounded.soft(rounded.h())[0], tensor(f"{case}/w_soft_V"), rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded.hard()[0], tensor(f"{case}/w_hard_V"))


@pytest.mark.parametrize("case", CASES)
def test_regulariser_and_its_gradient(case):
    v = tensor(f"{case}/V").requires_grad_()
    for i, b in enumerate(GOLDEN[f"{case}/reg_b"]):
        v.grad = None
        value = regulariser(rectified_sigmoid(v), float(b))
        value.backward()
        assert value.item() == pytest.approx(GOLDEN[f"{case}/reg_V"][i], rel=1e-5)
        torch.testing.assert_close(v.grad, tensor(f"{case}/reg_grad_V")[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_temperature(name):
    found = re.fullmatch(r"sched_T(\d+)_wu([\d.]+)_b(\d+)-(\d+)", name).groups()
    annealing = Annealing(int(found[0]), warmup=float(found[1]), start=float(found[2]), end=float(found[3]))
    b = [annealing.b(t) for t in GOLDEN[f"{name}/t"]]
    np.testing.assert_allclose(b, GOLDEN[f"{name}/b"], rtol=1e-9)


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_reconstruction_loss(power):
    loss = reconstruction_loss(tensor("loss/pred"), tensor("loss/tgt"), power)
    assert float(loss) == pytest.approx(float(GOLDEN[f"loss/lp_p{power}"]), rel=1e-5)


def test_the_whole_loss_at_each_of_a_hundred_calls():
    h = rectified_sigmoid(tensor("loss/V"))
    output = reconstruction_loss(tensor("loss/pred"), tensor("loss/tgt"))
    annealing = Annealing(100, weight=0.01, warmup=0.2, start=20, end=2)
    totals = [float(output + annealing.penalty(h, t)) for t in range(1, 101)]
    np.testing.assert_allclose(totals, GOLDEN["loss/total_by_call_100"], rtol=1e-5)
