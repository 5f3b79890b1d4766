"""Ranges per bin of sampling steps: each row is that of a static quantizer calibrated on the bin alone."""

import copy

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import (
    Policy,
    QRange,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    calibrate_activations_,
    calibrate_weights_,
    calibrating,
    finish_calibration,
    quantize_,
    quantizers,
    range_table,
    select_row,
    step_of,
)

BINS = 3


@pytest.fixture
def batches():
    """A batch per bin, each of another scale."""
    make = torch.Generator().manual_seed(1)
    return [scale * torch.randn(6, 4, generator=make) for scale in (1, 10, 0.1)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2))


def quantized(bins, batches_of_rows, metric="mse", finish_each=True):
    """Calibrated on [(row, batch)]; `finish_each`: the search follows each row at once."""
    model = network()
    spec = TensorSpec(4, bins=bins)
    rules = [Rule("0", QuantSpec(TensorSpec(4), TensorSpec(4, granularity=Segments((1, 3)), bins=bins))),
             Rule("*", QuantSpec(TensorSpec(4), spec, spec))]
    quantize_(model, rules, (torch.zeros(1, 4),))
    calibrate_weights_(model, metric)
    for row, batch in batches_of_rows:
        if bins > 1:
            select_row(model, row)
        with calibrating(model), torch.no_grad():
            model(batch)
        if finish_each:
            finish_calibration(model, metric)
    if not finish_each:
        finish_calibration(model, metric)
    return model


@pytest.mark.parametrize(("metric", "finish_each"), [("mse", True), ("minmax", False), ("kl", True)])
def test_each_row_is_a_static_quantizer_of_its_bin_bit_for_bit(batches, metric, finish_each):
    binned = quantized(BINS, list(enumerate(batches)), metric, finish_each)
    for row, batch in enumerate(batches):
        static = quantized(1, [(0, batch)], metric)
        for (name, one), (_, other) in zip(quantizers(binned), quantizers(static), strict=True):
            if "weight" not in name:
                for field in QRange._fields:
                    assert torch.equal(getattr(one, field)[row : row + 1], getattr(other, field)), (name, field)
        select_row(binned, row)
        assert torch.equal(binned(batch), static(batch))


def test_a_bin_without_its_turn_leaves_the_model_uncalibrated(batches):
    model = quantized(BINS, list(enumerate(batches))[:2], "minmax")
    with pytest.raises(QuantizationError, match="not calibrated"):
        model(batches[0])
    with pytest.raises(QuantizationError, match="not calibrated"):
        range_table(model)


def test_observing_needs_a_row(batches):
    model = network()
    quantize_(model, [Rule("*", QuantSpec(TensorSpec(4), TensorSpec(4, bins=BINS)))], (torch.zeros(1, 4),))
    calibrate_weights_(model, "minmax")
    with calibrating(model), pytest.raises(QuantizationError, match="3 bins of steps and none was chosen"):
        model(batches[0])


def test_chosen_quantizers_observe_and_the_others_let_pass(batches):
    model = network()
    quantize_(model, [Rule("*", QuantSpec(TensorSpec(4), TensorSpec(4)))], (torch.zeros(1, 4),))
    calibrate_weights_(model, "minmax")
    for batch, chosen in ((batches[0], {"0.input_quantizer"}), (batches[1], {"2.input_quantizer"})):
        with calibrating(model, chosen), torch.no_grad():
            model(batch)
    finish_calibration(model, "minmax")
    low, high = batches[0].aminmax()
    assert float(model[0].input_quantizer.scale) == pytest.approx(float(high - low) / 15)
    read = nn.functional.silu(nn.functional.linear(batches[1], model[0].weight, model[0].bias)).detach()
    assert float(model[2].input_quantizer.scale) == pytest.approx(float(read.max() - read.min()) / 15)


def test_rows_travel_with_the_state_dict_and_with_copies(batches):
    model = quantized(BINS, list(enumerate(batches)), "minmax")
    fresh = network()
    spec = TensorSpec(4, bins=BINS)
    rules = [Rule("0", QuantSpec(TensorSpec(4), TensorSpec(4, granularity=Segments((1, 3)), bins=BINS))),
             Rule("*", QuantSpec(TensorSpec(4), spec, spec))]
    quantize_(fresh, rules, (torch.zeros(1, 4),))
    fresh.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    for row, batch in enumerate(batches):
        for other in (model, fresh, copied):
            select_row(other, row)
        assert torch.equal(fresh(batch), model(batch)) and torch.equal(copied(batch), model(batch))
    assert range_table(model)["2.output_quantizer"]["bits"] == 4
    assert len(range_table(model)["0.input_quantizer"]["scale"]) == BINS


def test_bins_of_a_whole_unet_share_one_step(unet, example, batch):
    report = quantize_(unet, Policy().rules(Widths(8, 8), bins=2), example)
    assert step_of(unet).rows == 2 and report.candidates == 1 and report.totals["coverage"]["everything"] == 1
    calibrate_weights_(unet, "minmax")
    for row in (0, 1):
        select_row(unet, row)
        calibrate_activations_(unet, "minmax", [batch])
    assert all(len(q.scale) == 2 for name, q in quantizers(unet) if "weight" not in name)


def test_bins_exclude_candidate_widths_and_weights():
    with pytest.raises(ConfigError, match="TensorSpec.bins=2.*candidate widths"):
        TensorSpec((4, 8), bins=2)
    with pytest.raises(ConfigError, match="TensorSpec.bins=0"):
        TensorSpec(4, bins=0)
    with pytest.raises(ConfigError, match="a weight is the same at every step"):
        QuantSpec(TensorSpec(4, bins=2))
