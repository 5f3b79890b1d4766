"""Blocks are found by name, in the order of a forward; capture gives the real arguments of each."""

import pytest
import torch
from torch import nn

from ptq_exp.errors import PTQError, QuantizationError
from ptq_exp.quantization import Policy, QuantSpec, Rule, TensorSpec, Widths, calibrate_weights_, quantize_
from ptq_exp.reconstruction import Arena, Block, Rounding, capture, find_blocks
from ptq_exp.reconstruction.blocks import held_twice

EXAMPLE = (torch.zeros(1, 1, 6, 6), torch.zeros(1))
CPU = torch.device("cpu")


def test_the_outermost_match_is_a_block_and_all_else_single_layers_in_execution_order(quantized):
    network = quantized(4)
    blocks = find_blocks(network, ("*conv1", "*resnets.*"), EXAMPLE)
    inside = ("time", "conv1", "conv2")
    assert [block.name for block in blocks] == ["embed", "conv_in", "resnets.0", "resnets.1", "conv_out"]
    assert [set(block.layers) for block in blocks] == [{""}, {""}, set(inside), set(inside), {""}]
    assert blocks[2].layers[-1] == "conv2"
    layers = find_blocks(network, (), EXAMPLE)
    assert len(layers) == 9 and all(block.layers == ("",) for block in layers)


def test_every_quantized_layer_is_in_exactly_one_block_of_each_embedded_model():
    from ptq_exp.embedded import digits_ldm_model, digits_model

    for make in (digits_model, digits_ldm_model):
        model = make()
        network = model.copy_denoiser()
        quantize_(network, Policy().rules(Widths(8, 8)), model.example_inputs())
        names = [name for name, module in network.named_modules() if hasattr(module, "weight_quantizer")]
        calibrate_weights_(network, "minmax")
        for module in network.modules():  # placement alone is under test
            if type(module).__name__ == "ActivationQuantizer":
                module.mode = "off"
        blocks = find_blocks(network, model.blocks, model.example_inputs())
        found = [f"{block.name}.{layer}".removesuffix(".") for block in blocks for layer in block.layers]
        assert sorted(found) == sorted(names)
        assert any(len(block.layers) > 3 and "resnets" in block.name for block in blocks)
        kind = "attentions" if make is digits_model else "transformer_blocks"
        assert any(kind in block.name and len(block.layers) > 3 for block in blocks)


class Twice(nn.Module):
    """Calls its one layer two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_layer_that_is_called_twice_is_refused():
    network = Twice()
    quantize_(network, Policy(first=(), last=(), attention=False).rules(Widths(4, 8)), (torch.zeros(1, 2),))
    calibrate_weights_(network, "minmax")
    network.layer.input_quantizer.mode = "off"
    with pytest.raises(QuantizationError, match="layer is called 2 times"):
        find_blocks(network, (), (torch.zeros(1, 2),))


@pytest.mark.parametrize("limit", [1e9, 0, 3000])
def test_capture_equals_a_direct_forward_in_memory_and_on_disk(limit, toy, calibration_set, tmp_path):
    arena = Arena(limit, tmp_path / "rows")
    calls = capture(
        toy, "resnets.1", calibration_set.batches(16), 40, arena, output=True, device=CPU,
    )
    assert len(calls) == 40 and bool(arena.files) == (limit < 1e9)
    x, t, _ = next(iter(calibration_set.batches(40)))
    seen = []
    handle = toy.resnets[1].register_forward_hook(lambda _, a, k, o: seen.append((a, k, o)), with_kwargs=True)
    toy(x, t)
    handle.remove()
    (args, kwargs, (output,)) = seen[0]
    torch.testing.assert_close(calls.tensors[0], args[0])
    got_args, got_kwargs = calls.arguments(calls.tensors)
    assert len(got_args) == 1 and got_kwargs["scale"] == 0.5
    torch.testing.assert_close(got_kwargs["temb"], kwargs["temb"])
    torch.testing.assert_close(calls.output, output)
    torch.testing.assert_close(toy.resnets[1](*got_args, **got_kwargs)[0], calls.output)
    arena.clear()
    assert not list(tmp_path.glob("rows/*.bin"))


def test_capture_ends_the_forward_at_the_block(toy, calibration_set, tmp_path):
    late = []
    handle = toy.conv_out.register_forward_hook(lambda *_: late.append(1))
    for output in (True, False):
        calls = capture(
            toy, "resnets.0", calibration_set.batches(40), 40, Arena(1e9, tmp_path), output=output, device=CPU
        )
        assert (calls.output is not None) == output
    handle.remove()
    assert not late


def test_rows_that_cannot_be_written_say_which_setting_to_change(toy, calibration_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="reconstruction.cache_gb"):
        capture(
            toy, "conv_in", calibration_set.batches(40), 40, Arena(0, tmp_path / "file"), output=True, device=CPU
        )


def test_a_block_names_its_modules(toy):
    block = Block("resnets.0", ("conv1", "conv2"))
    assert block.module(toy) is toy.resnets[0] and block.modules(toy) == [toy.resnets[0].conv1, toy.resnets[0].conv2]


def test_roundings_of_number_formats_are_refused_by_name():
    layer = nn.Sequential(nn.Linear(4, 4))
    quantize_(layer, [Rule("*", QuantSpec(TensorSpec("mxfp4"), TensorSpec(4)))], (torch.randn(1, 4),))
    with pytest.raises(QuantizationError, match="0 is quantized to the number format mxfp4.*reconstruction=gptq"):
        Rounding([layer[0].weight], [layer[0].weight_quantizer])


class Joint(nn.Module):
    """A block of two streams of tokens, as those of SD3 and FLUX."""

    def __init__(self, widths=(4, 4)):
        super().__init__()
        self.text, self.image = (nn.Linear(4, width) for width in widths)

    def forward(self, text, image):
        return self.text(text), self.image(image)


class OfJoint(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        text, image = self.block(x[:, :3], x)
        return text.sum() + image.sum()


def test_streams_of_tokens_of_a_joint_block_stand_behind_each_other(tmp_path):
    block, x = Joint(), torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    calls = capture(OfJoint(block), "block", [(x[:4],), (x[4:],)], 6, Arena(1e6, tmp_path), output=True, device=CPU)
    assert torch.allclose(calls.output, torch.cat([block.text(x[:, :3]), block.image(x)], 1), atol=1e-6)
    assert calls.output.shape == (6, 8, 4) and not calls.output.requires_grad


def test_streams_of_other_widths_are_refused_with_the_setting(tmp_path):
    x = torch.zeros(2, 5, 4)
    said = r"block returns 2 tensors \(\(2, 3, 4\), \(2, 5, 7\)\).*granularity=layer"
    with pytest.raises(QuantizationError, match=said):
        capture(OfJoint(Joint((4, 7))), "block", [(x,)], 2, Arena(1e6, tmp_path), output=True, device=CPU)


def test_tensors_of_two_names_are_noticed():
    module = nn.Module()
    module.a, module.b, module.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
    module.d = module.c  # a module of two names
    assert not held_twice(module, [module.a.weight, module.b.weight])
    assert held_twice(module, [module.a.weight, module.c.running_mean])
    module.b.weight = module.a.weight
    assert held_twice(module, [module.a.weight]) and held_twice(module, [module.b.weight])
    assert not held_twice(module, [module.b.bias]) and not held_twice(module, [])
