"""A file fills its network totally, or the error says what it is instead."""

import pytest
import torch

from ptq_exp.diffusion.checkpoints import Part, fill, identity, read_checkpoint
from ptq_exp.diffusion.checkpoints.families import looks_like
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import CheckpointError

PREFIX = "model.diffusion_model."
NAMES = {"ddim_cifar10": "iddpm_cifar10", "ddim_imagenet64": "iddpm_imagenet64", "ddpm_cifar10": "ddim_cifar10",
         "ldm4_imagenet256": "ldm4_imagenet256", "ldm4_lsun_bedrooms256": "ldm4_lsun_bedrooms256"}
ONE_KEY = {"ddim_cifar10": "input_blocks.5.0.out_layers.3.weight", "ddim_imagenet64": "middle_block.1.proj_out.bias",
           "ddpm_cifar10": "up.1.block.0.nin_shortcut.bias",
           "ldm4_imagenet256": f"{PREFIX}middle_block.1.transformer_blocks.0.norm2.bias",
           "ldm4_lsun_bedrooms256": f"{PREFIX}output_blocks.5.2.conv.weight"}


def message(name, path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_model(name, path, **options)
    text = str(caught.value)
    assert text.startswith(f"model.checkpoint={path}: ") and "\n" not in text
    return text


def options(name):
    return {"ema": False} if name == "ldm4_lsun_bedrooms256" else {}


@pytest.mark.parametrize("name", NAMES)
def test_an_extra_tensor_is_an_error(golden, saved, name):
    path = saved({**golden.hollow(NAMES[name]), "input_blocks.99.0.strange": torch.zeros(1)})
    assert "1 unexpected (input_blocks.99.0.strange)" in message(name, path, **options(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_an_error(golden, saved, name):
    state = golden.hollow(NAMES[name])
    del state[ONE_KEY[name]]
    text = message(name, saved(state), **options(name))
    assert "1 missing (" in text and "unexpected" not in text and "wanted is" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_an_error(golden, saved, name):
    state = golden.hollow(NAMES[name])
    expected = list(state[ONE_KEY[name]].shape)
    state[ONE_KEY[name]] = torch.zeros(1).expand(expected[0] + 1, *expected[1:])
    text = message(name, saved(state), **options(name))
    assert f"1 misshaped ({ONE_KEY[name]} [{expected[0] + 1}" in text and f"instead of {expected})" in text


@pytest.mark.parametrize("key", ["input_blocks.5.1.qkv.weight", "input_blocks.5.1.qkv.bias"])
@pytest.mark.parametrize("rows", [0, 1, 700, 771])
def test_a_fused_weight_of_another_shape_is_an_error(golden, saved, key, rows):
    state = golden.hollow("iddpm_cifar10")
    state[key] = torch.zeros(1).expand(rows, *state[key].shape[1:])
    text = message("ddim_cifar10", saved(state))
    assert f"1 misshaped ({key} {list(state[key].shape)} instead of 3 x [256" in text


@pytest.mark.parametrize(("file", "name"), [(a, b) for a in NAMES for b in NAMES if a != b and "ldm4_lsun" not in b])
def test_a_mix_up_names_what_the_file_is(golden, saved, file, name):
    text = message(name, saved(golden.hollow(NAMES[file])))
    expected = "unconditional latent diffusion model (LSUN)" if "lsun" in file else f"({file})"
    assert f"looks like {looks_like(golden.hollow(NAMES[file]))}" in text and expected in text


def test_ldm8_is_told_apart_from_ldm4(golden, saved):
    """The older class-conditional model: 256 channels, latents [4, 32, 32], 16384 codes."""
    state = {key: value for key, value in golden.hollow("ldm4_imagenet256").items() if ".3.0." not in key}
    state[f"{PREFIX}input_blocks.0.0.weight"] = torch.zeros(1).expand(256, 4, 3, 3)
    state["first_stage_model.quantize.embedding.weight"] = torch.zeros(1).expand(16384, 4)
    text = message("ldm4_imagenet256", saved({"state_dict": state}))
    assert "LDM-8 `cin256`" in text and "wanted is LDM-4 `cin256-v2`" in text


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"input_blocks.0.0.weight": (128, 3, 3, 3)}, "guided-diffusion"),
        ({"input_blocks.0.0.weight": (192, 3, 3, 3), "label_emb.weight": (1, 1), "input_blocks.4.0.op.weight": (1,)},
         "class-conditional"),
        ({"input_blocks.0.0.weight": (192, 3, 3, 3), "input_blocks.4.0.op.weight": (1,)}, "another improved-diffusion"),
        ({"temb.dense.0.weight": (512, 128), "conv_in.weight": (128, 3, 3, 3), "down.5.block.0.conv1.weight": (1,)},
         "another DDIM"),
        ({f"{PREFIX}input_blocks.0.0.weight": (320, 4, 3, 3), "a.attn2.to_k.weight": (320, 768)}, "Stable Diffusion"),
        ({f"{PREFIX}input_blocks.0.0.weight": (320, 4, 3, 3), "a.attn2.to_k.weight": (320, 1280)},
         "another conditional latent"),
        ({"down_blocks.0.resnets.0.conv1.weight": (24, 24, 3, 3), "conv_in.weight": (24, 1, 3, 3)}, "digits"),
        ({"down_blocks.0.resnets.0.conv1.weight": (24, 24, 3, 3), "conv_in.weight": (24, 3, 3, 3)}, "diffusers"),
        ({"encoder.down.0.block.0.conv1.weight": (1,)}, "first stage"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, "autoencoder in the layout of diffusers"),
        ({"pos_embed.proj.weight": (1,)}, "DiT in the layout of diffusers"),
        ({"x_embedder.proj.weight": (1,)}, "DiT in its original layout"),
        ({"layer.weight": (1,)}, "no known checkpoint (it starts with layer.weight)"),
    ],
)
def test_families(state, expected):
    assert expected in looks_like({key: torch.zeros(1).expand(shape) for key, shape in state.items()})


def test_losses_and_buffers_may_be_left_over(golden, saved):
    state = golden.hollow("ldm4_imagenet256")
    del state[ONE_KEY["ldm4_imagenet256"]]
    state |= {"first_stage_model.loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    assert "unexpected" not in message("ldm4_imagenet256", saved(state))


@pytest.mark.parametrize("name", ["ldm4_imagenet256", "ldm4_lsun_bedrooms256"])
def test_another_noise_schedule_is_an_error(golden, saved, monkeypatch, name):
    monkeypatch.setattr("ptq_exp.diffusion.zoo.latent.fill", lambda *args, **kwargs: None)
    state = golden.hollow(NAMES[name])
    state["betas"] = torch.linspace(1e-4, 0.02, 1000)
    text = message(name, saved(state))
    assert "another noise schedule: betas runs 0.0001..0.02 over 1000 steps instead of 0.0015..0.0195" in text


def test_averaged_weights_that_do_not_match_are_an_error(golden, saved):
    state = golden.hollow("ldm4_lsun_bedrooms256")
    state["model_ema.diffusion_modelout9weight"] = state.pop("model_ema.diffusion_modelout2weight")
    text = message("ldm4_lsun_bedrooms256", saved(state))
    assert "1 unexpected (model_ema.diffusion_modelout9weight)" in text
    assert "1 missing (conv_out.weight of model.diffusion_model)" in text


def test_a_file_without_averaged_weights_says_which_setting_to_change(golden, saved):
    state = {key: value for key, value in golden.hollow("ldm4_lsun_bedrooms256").items() if "model_ema" not in key}
    assert "set model.ema=false" in message("ldm4_lsun_bedrooms256", saved(state))


def test_filled_modules_do_not_change_with_the_file(saved):
    path = saved({"weight": torch.ones(3, 2, dtype=torch.float16), "bias": torch.ones(3)})
    with torch.device("meta"):
        linear = torch.nn.Linear(2, 3)
    fill([Part(linear, identity)], read_checkpoint(path), path, wanted="a layer")
    with open(path, "r+b") as stream:
        size = len(stream.read())
        stream.seek(0)
        stream.write(bytes(size))
    assert linear.weight.dtype == torch.float32 and torch.equal(linear.weight, torch.ones(3, 2))
