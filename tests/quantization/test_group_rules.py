"""Bit-widths per group of layers, on the embedded U-Net."""

import pytest

from ptq_exp.embedded import digits_model
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Policy, Report, Rule, Widths, quantize_
from ptq_exp.quantization.group_rules import group_bits, with_groups
from ptq_exp.quantization.layers import QUANTIZED

EDGES = ("*conv_in", "*conv_out")


@pytest.fixture(scope="module")
def model():
    return digits_model()


def quantized(model, groups, keep=()) -> Report:
    network = model.copy_denoiser()
    names = [name for name, module in network.named_modules() if type(module) in QUANTIZED]
    rules = [Rule(pattern, None, "kept") for pattern in keep] + Policy().rules(Widths(8, 8))
    return quantize_(network, with_groups(rules, groups, names, EDGES), model.example_inputs())


def widths(report: Report) -> dict[str, tuple]:
    return {row.name: (row.weight_bits, row.activation_bits) for row in report.rows}


def test_the_first_group_decides_and_all_else_stays(model):
    groups = {"a": ("*attentions.*", 4, 6), "d": ("*down_blocks.*", 3, 5)}
    before, after = widths(quantized(model, {})), widths(quantized(model, groups))
    assert before.keys() == after.keys() and len(after) > 100
    for name, found in after.items():
        if name.endswith(".av"):  # v has the group's width, the softmax map its own
            assert found == (6, 8) and before[name] == (8, 8)
        elif name.endswith(".qk"):
            assert found == (6, 6)
        elif ".attentions." in name:
            assert found == (4, 6)
        elif "down_blocks" in name:
            assert found == (3, 5)
        else:
            assert found == before[name]


def test_layers_in_full_precision_and_the_first_and_last_ones_stay(model):
    found = widths(quantized(model, {"all": ("*", 4, 4)}, keep=["*time_embedding*"]))
    assert found["unet.conv_in"] == found["unet.conv_out"] == (8, 16)
    assert found["unet.time_embedding.linear_1"] == (None, None)
    assert found["unet.mid_block.resnets.0.conv1"] == (4, 4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"bits.groups.x": ("*conv9", 4, 4)}, r"bits.groups.x: '\*conv9' matches no layer .* names near it: unet"),
        ({"bits.groups.x": ("*conv_in", 4, 4)}, r"bits.groups.x: '\*conv_in' matches no layer between the first and"),
        ({"a": ("*mid_block.*", 4, 4), "b": ("*mid_block.*conv1", 6, 6)}, r"b: all layers that .* in groups before it"),
    ],
)
def test_a_group_without_layers_is_an_error(groups, message, model):
    with pytest.raises(ConfigError, match=message):
        quantized(model, groups)


def test_widths_are_spelt_as_the_names_of_bits():
    assert group_bits("s", "w4a8") == (4, 8)
    for wrong in ("4", 4, "w4", "a8w4", None, [4, 8]):
        with pytest.raises(ConfigError, match="s=.*: give a weight and an activation width, such as w4a8"):
            group_bits("s", wrong)
    for wrong in ("w1a8", "w8a9"):
        with pytest.raises(ConfigError, match="s=[19]: choose 2..8"):
            group_bits("s", wrong)
