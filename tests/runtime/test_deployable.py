"""Plain operations compute what the simulation does: layer by layer on the same input, in float64 where ties matter."""

import copy

import pytest
import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import calibrate_, select_row
from ptq_exp.runtime.deployable import Deployable, deployable
from ptq_exp.runtime.plan import FLOAT, INT8, integer_plan

WIDTHS = [(8, 8), (4, 8), (8, 4), (7, 6), (2, 3), (3, 8)]


def error(found, wanted) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def on_the_same_input(network, plain: Deployable, x) -> dict[str, float]:
    """Relative error of every planned layer on the input that it has in the simulation."""
    inputs, outputs = {}, {}

    def keep(name):
        def hook(module, given, output):
            inputs[name], outputs[name] = given[0], output
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules()
               if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    network(x)
    for handle in handles:
        handle.remove()
    return {name: error(plain.network.get_submodule(name)(inputs[name]), outputs[name]) for name in inputs
            if not name.endswith(("to_q", "to_k", "to_v"))}  # quantized on the heads


@pytest.mark.parametrize(("weight", "activation"), WIDTHS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_layer_agrees_on_the_same_input(weight, activation, symmetric, calibrated):
    network, x = calibrated(weight_bits=weight, activation_bits=activation, weight_symmetric=symmetric)
    plain = deployable(network, integer_plan(network))
    errors = on_the_same_input(network, plain, x)
    assert len(errors) == 7 and max(errors.values()) < 1e-5, errors


def test_the_network_itself_is_left_alone(calibrated):
    network, x = calibrated()
    before, state = network(x), copy.deepcopy(network.state_dict())
    deployable(network, integer_plan(network))(x)
    assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_eight_bit_weights_with_a_zero_point_get_a_channel_of_ones(calibrated):
    network, _ = calibrated()
    plan = integer_plan(network)
    weight = plan["second"].weights[0]
    assert weight.shifted and weight.levels.dtype == torch.int8
    rebuilt = (weight.levels.float() + weight.offset.view(-1, 1, 1, 1)) * weight.scale.view(-1, 1, 1, 1)
    assert torch.equal(rebuilt, network.second.weight)
    assert deployable(network, plan).network.second.parts[0].levels.shape[0] == 17
    assert not integer_plan(calibrated(weight_symmetric=True)[0])["second"].weights[0].shifted


def test_what_is_planned_says_why(calibrated):
    plan = integer_plan(calibrated()[0])
    assert {name: entry.reason for name, entry in plan.items() if entry.executed == FLOAT} == {
        "first": "16-bit input", "last": "16-bit input",
        "attention": "q, k or v is asymmetric",
    }
    symmetric = integer_plan(calibrated(activation_symmetric=True)[0])
    assert symmetric["attention"].executed == INT8


def test_sixteen_bit_inputs_keep_their_rounding(calibrated):
    network, x = calibrated()
    plain = deployable(network, integer_plan(network))
    assert error(plain.network.first(x), network.first(x)) < 1e-6
    wanted = network.first.input_quantizer(x)
    assert torch.equal(plain.network.first.inputs[0](x), wanted)


def batches_by_row(network, x):
    """A batch for each of two rows of ranges, the second three times as large."""
    for row, factor in ((0, 1.0), (1, 3.0)):
        select_row(network, row)
        yield (factor * x,)


@pytest.mark.parametrize("activation", [8, 6])
def test_ranges_of_two_bins_are_chosen_by_the_last_input(activation, made):
    network, x = made(activation_bits=activation, bins=2)
    calibrate_(network, "mse", batches_by_row(network, x))
    plain = deployable(network, integer_plan(network))
    assert plain.rows == 2
    for row in (0, 1):
        select_row(network, row)
        assert error(plain(x, torch.tensor([row])), network(x)) < 0.02


def test_candidate_widths_are_chosen_by_the_last_input(calibrated):
    network, x = calibrated(activation_bits=(4, 8))
    plain = deployable(network, integer_plan(network))
    for row in (0, 1):
        select_row(network, row)
        assert error(plain(x, torch.tensor([row])), network(x)) < 0.02


def test_groups_of_input_channels_are_refused_or_re_gridded(calibrated):
    network, x = calibrated(weight_bits=4, weight_granularity="group", group_size=8)
    with pytest.raises(ConfigError, match="second has a scale for every 8 input channels.*weight_granularity=channel"):
        integer_plan(network)
    plan = integer_plan(network, regrid=True)
    assert plan["second"].executed == INT8 and plan["second"].reason.startswith("re-gridded")
    assert error(deployable(network, plan)(x), network(x)) < 0.05


def test_weights_of_seven_bits_stay_within_half_a_byte(calibrated):
    network, _ = calibrated()
    plan = integer_plan(network, seven_bits=True)
    found = [weight for entry in plan.values() for weight in entry.weights]
    assert found and max(int(weight.levels.abs().max()) for weight in found) <= 64
    four = integer_plan(calibrated(weight_bits=4)[0], seven_bits=True)
    assert not any(entry.reason.startswith("re-gridded") for entry in four.values())
