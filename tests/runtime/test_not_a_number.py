"""Samples whose inputs hold NaN, in every runtime: lost, and no others with them."""

import pytest
import torch

from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.not_a_number import keep_nan


@pytest.mark.parametrize("name", ["simulate", "torch", "openvino"])
def test_a_lost_sample_stays_lost_and_others_are_what_they_were(name, calibrated):
    if name == "openvino":
        pytest.importorskip("openvino")
    network, x = calibrated(weight_bits=8, activation_bits=8)
    made = runtime_of(name).compile(network, (x[:1],))
    with torch.no_grad():
        wanted = made(x)
        spoilt = x.clone()
        spoilt[1, 0, 3, 3] = torch.nan
        found = made(spoilt)
    assert found[1].isnan().any() and torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]])
    assert wanted.isfinite().all()


def test_every_input_of_a_sample_counts_and_no_other_tensor():
    result = torch.arange(12.0).view(3, 2, 2)
    states, times, text = torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 4, 2)
    text[2, 1, 1], times[0] = torch.nan, torch.nan
    mask, row, ids = torch.full((1, 4), torch.nan), torch.tensor(torch.nan), torch.arange(3)
    found = keep_nan(result, (states, times, text, mask, row, ids))
    assert found.isnan().flatten(1).all(1).tolist() == [True, False, True] and torch.equal(found[1], result[1])
    assert keep_nan(result, (mask, row, ids)) is result


def test_other_results_are_left_alone():
    lost = torch.full((2, 3), torch.nan)
    for result in (torch.zeros(2, dtype=torch.long), torch.zeros(()), torch.zeros(2, 1) > 0):
        assert keep_nan(result, (lost,)) is result
    assert keep_nan(torch.zeros(0, 4), (torch.zeros(0, 3), torch.zeros(0))).shape == (0, 4)
    assert keep_nan(torch.zeros(2, 3), (torch.zeros(2, 0),)).isfinite().all()
