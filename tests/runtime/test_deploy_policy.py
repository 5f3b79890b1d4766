"""The policy `deploy`: an engine executes nearly everything as integers, in every attention product and layer."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from small_networks import use_few_candidate_ranges

from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.plan import FLOAT, INT8, integer_plan

CONF = Path(__file__).parents[2] / "conf" / "quantization"
ENDS = {"first": ("*conv_in",), "last": ("*conv_out",)}


def settings(name: str) -> dict:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return {key: value for key, value in values.items() if key != "defaults"}


def unet():
    """A U-Net whose two ends are less than half a percent of it, as in the embedded and the published ones."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32, norm_num_groups=8,
    ).eval().requires_grad_(False)
    network.register_forward_hook(lambda module, call, output: output.sample)
    return network, (torch.randn(2, 1, 8, 8), torch.tensor([20.0, 800.0]))


@pytest.fixture
def calibrated_unet(monkeypatch):
    """A function of the weight bits that makes the calibrated network and its call."""
    use_few_candidate_ranges(monkeypatch)

    def make(bits):
        network, call = unet()
        policy = Policy(**settings("full") | settings("deploy") | ENDS)
        quantize_(network, policy.rules(Widths(bits, 8)), tuple(part[:1] for part in call))
        calibrate_(network, "mse", [call])
        return network, call

    return make


def test_four_bit_weights_are_planned_as_integers_without_a_channel_of_ones(calibrated_unet):
    plan = integer_plan(calibrated_unet(4)[0])
    assert {name for name, entry in plan.items() if entry.executed == FLOAT} == {"conv_in", "conv_out"}
    assert not any(weight.shifted for entry in plan.values() for weight in entry.weights)
    assert not any(entry.reason for entry in plan.values() if entry.executed == INT8)


def test_the_engine_executes_all_but_the_ends_as_integers(calibrated_unet):
    network, call = calibrated_unet(8)
    example = tuple(part[:1] for part in call)
    runtime = runtime_of("openvino", {"threads": 1})
    made = runtime.compile(network, example)
    made._try_first = False
    assert made(*call).shape == call[0].shape
    rows = runtime.account()
    products = [row for row in rows if row.is_product]
    assert {row.layer for row in rows if row.executed == "float"} == {"conv_in", "conv_out"}
    assert len(products) == 8 and rows.attention_int8_share == 1
    assert 0.995 <= rows.int8_share < 1
