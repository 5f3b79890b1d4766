"""Concatenations, cut embeddings and time layers are found in U-Nets, not in a transformer, and cut as by hand."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn

from ptq_exp.diffusion.denoisers import DiTDenoiser
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.quantization import (
    PerChannel,
    PerGroup,
    QuantSpec,
    Rule,
    TensorSpec,
    calibrate_weights_,
    calibrating,
    depending_on_alone,
    fake_quantize,
    find_chunks,
    find_concats,
    finish_calibration,
    quantize_,
    search_range,
    segmented,
    with_outputs,
)

SHORTCUTS_OF_DIGITS = {
    "0.resnets.0": (72, 72), "0.resnets.1": (72, 72), "0.resnets.2": (72, 48),
    "1.resnets.0": (72, 48), "1.resnets.1": (48, 48), "1.resnets.2": (48, 24),
    "2.resnets.0": (48, 24), "2.resnets.1": (24, 24), "2.resnets.2": (24, 24),
}


class Net(nn.Module):
    """Concatenations of all kinds; x [N, 2, 4, 4], t [N]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 5, 1)
        self.direct, self.behind, self.summed = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.nested, self.norm, self.time = nn.Conv2d(10, 4, 1), nn.GroupNorm(2, 8), nn.Linear(4, 6)
        self.tokens, self.mixed = nn.Linear(4, 3), nn.Linear(6, 6)

    def forward(self, x, t):
        both = torch.cat([self.a(x), self.b(x)], dim=1)
        behind = self.behind(F.silu(self.norm(both)))
        summed = self.summed(both + 1) + self.direct(both.clone())
        nested = self.nested(torch.cat((both, x), 1)) + self.tokens(
            torch.cat([x.flatten(2), x.flatten(2)], dim=1).unflatten(2, (4, 4))
        ).mean()
        scale, shift = self.time(torch.cat([t[:, None].sin(), t[:, None].cos()] * 2, dim=1)).chunk(2, dim=1)
        gate = self.mixed(torch.cat([scale, x.mean((2, 3, 1))[:, None].expand(-1, 3)], dim=1))
        return (behind + summed + nested) * (1 + scale.mean()) + shift.mean() + gate.mean()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1))


EXAMPLE = torch.zeros(1, 2, 4, 4), torch.zeros(1)


def test_what_reads_a_concatenation_directly_or_behind_maps_of_channels(net):
    direct = {"direct": (3, 5), "nested": (3, 5, 2)}
    assert find_concats(net, EXAMPLE) == direct
    assert find_concats(net, EXAMPLE, through_maps=True) == direct | {"behind": (3, 5)}
    assert net.training and not net.direct._forward_pre_hooks


def test_a_tensor_changed_in_place_is_no_concatenation_any_more():
    class Changed(Net):
        def forward(self, x, t):
            both = torch.cat([self.a(x), self.b(x)], dim=1)
            both += 1
            return self.direct(both)

    assert find_concats(Changed(), EXAMPLE) == {}


def test_a_layer_that_reads_different_parts_is_left_out():
    class Twice(Net):
        def forward(self, x, t):
            a, b = self.a(x), self.b(x)
            return self.direct(torch.cat([a, b], dim=1)) + self.direct(torch.cat([b, a], dim=1))

    assert find_concats(Twice(), EXAMPLE) == {}


def test_digits_has_nine_split_shortcuts():
    model = load_model("digits")
    shortcuts = {f"unet.up_blocks.{k}.conv_shortcut": v for k, v in SHORTCUTS_OF_DIGITS.items()}
    main_path = {f"unet.up_blocks.{k}.conv1": v for k, v in SHORTCUTS_OF_DIGITS.items()}
    assert find_concats(model.denoiser, model.example_inputs()) == shortcuts
    assert find_concats(model.denoiser, model.example_inputs(), through_maps=True) == shortcuts | main_path


def test_the_latent_model_has_four():
    model = load_model("digits_ldm")
    found = find_concats(model.denoiser, model.example_inputs())
    assert list(found.values()) == [(96, 96), (96, 48), (96, 48), (48, 48)]
    assert all(name.endswith("conv_shortcut") and "up_blocks" in name for name in found)


def test_a_transformer_has_none_but_cuts_its_embeddings():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )
    denoiser = DiTDenoiser(transformer, 10).eval()
    example = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert find_concats(denoiser, example) == find_concats(denoiser, example, through_maps=True) == {}
    chunks = find_chunks(denoiser, example)
    assert [(name.rpartition("transformer_blocks.")[2], parts) for name, parts in chunks.items()] == [
        ("0.norm1.linear", (16,) * 6), ("1.norm1.linear", (16,) * 6), ("transformer.proj_out_1", (16, 16)),
    ]
    of_time = depending_on_alone(denoiser, example, 1)
    assert of_time and all("timestep_embedder" in name for name in of_time)  # the label is in all that follows


def test_the_halves_of_digits_time_embeddings():
    model = load_model("digits")
    found = find_chunks(model.denoiser, model.example_inputs())
    assert len(found) == 17 and all(name.endswith("time_emb_proj") for name in found)
    for name, halves in found.items():
        channels = model.denoiser.get_submodule(name).out_features
        assert halves == (channels // 2, channels // 2)


def test_layers_of_the_time_alone(net):
    assert depending_on_alone(net, EXAMPLE, 1) == ["time"]
    model = load_model("digits_ldm")
    found = depending_on_alone(model.denoiser, model.example_inputs(), 1)
    assert [name.removeprefix("unet.") for name in found][:2] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    assert len(found) == 10 and all("time_emb" in name for name in found)
    of_label = depending_on_alone(model.denoiser, model.example_inputs(), 2)
    # with one token of context attention passes its value on, whatever the state asks
    assert of_label and {name.partition("attn2.")[2] for name in of_label} == {"to_k", "to_v", "to_out.0"}


def by_hand(tensor, parts, axis, per_channel):
    """Each part fake-quantized by its own search."""
    done = []
    for part in tensor.split(parts, dim=axis):
        qrange = search_range(part, 4, symmetric=False, channel_axis=0 if per_channel else None, metric="minmax")
        done.append(fake_quantize(part, *qrange))
    return torch.cat(done, dim=axis)


def test_a_split_convolution_computes_as_by_hand(net, x):
    operand = TensorSpec(4)
    rules = segmented(
        [Rule("a", None), Rule("direct", QuantSpec(TensorSpec(4, granularity=PerChannel()), operand))],
        {"direct": (3, 5), "a": (1, 1), "b": (1, 1)},  # a is kept in full precision, b no rule speaks of
    )
    weight, read = net.direct.weight.detach().clone(), torch.cat([net.a(x), 20 * net.b(x)], dim=1).detach()
    quantize_(net, rules, EXAMPLE)
    calibrate_weights_(net, "minmax")
    with calibrating(net), torch.no_grad():
        net.direct(read)
    finish_calibration(net, "minmax")
    assert net.direct.input_quantizer.scale.shape == (1, 2) and net.direct.weight_quantizer.scale.shape == (4, 2)
    expected = F.conv2d(by_hand(read, (3, 5), 1, False), by_hand(weight, (3, 5), 1, True), net.direct.bias)
    torch.testing.assert_close(net.direct(read), expected, rtol=0, atol=2e-5)
    assert type(net.a) is nn.Conv2d and type(net.b) is nn.Conv2d


@pytest.mark.parametrize(("size", "groups"), [(3, (3, 3, 2)), (4, (4, 4)), (8, (8,)), (100, (8,))])
def test_group_wise_weights_by_brute_force(net, size, groups):
    weight = net.direct.weight.detach().clone()
    spec = TensorSpec(4, granularity=PerGroup(size))
    quantize_(net, [Rule("direct", QuantSpec(weight=spec))], EXAMPLE)
    calibrate_weights_(net, "mse")
    for channel in range(4):
        for part, found in zip(weight[channel].split(groups), net.direct.weight[channel].split(groups), strict=True):
            qrange = search_range(part[None], 4, symmetric=False, channel_axis=0, metric="mse")
            error = (fake_quantize(part[None], *qrange) - part).square().sum()
            assert (found - part).square().sum() <= error * 1.001 + 1e-12
    assert net.direct.weight_quantizer.scale.shape == (4, len(groups))


def test_groups_stay_inside_split_parts(net):
    spec = QuantSpec(TensorSpec(4, granularity=PerGroup(2)), TensorSpec(8))
    quantize_(net, segmented([Rule("direct", spec)], {"direct": (3, 5)}), EXAMPLE)
    assert net.direct.weight_quantizer.segments == (2, 1, 2, 2, 1)
    assert net.direct.input_quantizer.segments == (3, 5)


def test_the_halves_of_an_embedding_have_a_range_each(net):
    rules = [Rule("time", QuantSpec(TensorSpec(8), TensorSpec(8)))]
    rules = with_outputs(rules, find_chunks(net, EXAMPLE), TensorSpec(4))
    net.time.bias.data = torch.tensor([1.0, 2, 3, -10, -20, -30])
    t = torch.linspace(0, 3, 16)
    read = torch.stack([t.sin(), t.cos()] * 2, dim=1)
    expected = net.time(read).detach()
    quantize_(net, rules, EXAMPLE)
    calibrate_weights_(net, "minmax")
    with calibrating(net), torch.no_grad():
        net.time(read)
    finish_calibration(net, "minmax")
    low, high = expected[:, 3:].min(), expected[:, :3].max()
    scales = net.time.output_quantizer.scale.flatten()
    assert scales[0] == pytest.approx(float(high) / 15, rel=0.05)
    assert scales[1] == pytest.approx(-float(low) / 15, rel=0.05)
