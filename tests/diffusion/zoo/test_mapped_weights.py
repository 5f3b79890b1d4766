"""Weights that stay in their files: the same numbers as without that, whatever types the files hold."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from small_folders import dit_folder, latent_folder, pixel_folder

from ptq_exp.diffusion.zoo.build import frozen, mapped_weights
from ptq_exp.diffusion.zoo.components import load_component
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import ConfigError

FILE = "diffusion_pytorch_model.safetensors"
NORM = "conv_norm_out.weight"


def stored(root, kind, other=None, number=None):
    """Weights of a U-Net in the type `kind`, but for one in `other`; two of its numbers are `number`."""
    path = pixel_folder(root) / "unet" / FILE
    weights = {name: value.to(kind) for name, value in load_file(path).items()}
    if other is not None:
        weights[NORM] = weights[NORM].to(other)
        weights[NORM][:2] = 1 + 2**-10 if number is None else number
    save_file(weights, path, {"format": "pt"})
    return root


def loaded(root, kind, most=None):
    if most is None:
        return frozen(load_component(UNet2DModel, root, "unet", wanted=kind), kind)
    with mapped_weights(most):
        return load_component(UNet2DModel, root, "unet", wanted=kind)


@pytest.mark.parametrize(
    ("kind", "other", "wanted", "rounded"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float64, torch.bfloat16, torch.float32),  # by way of float32, as without files
        (torch.float64, None, torch.float64, torch.float64),
    ],
)
def test_few_numbers_of_another_type_are_converted_and_all_others_left_there(tmp_path, kind, other, wanted, rounded):
    root = stored(tmp_path, kind, other)
    found, expected = loaded(root, wanted, 1e6), loaded(root, wanted)
    assert {value.dtype for value in found.state_dict().values()} == {rounded}
    found = frozen(found, wanted).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_float64_is_loaded_as_it_is(tmp_path):
    root = stored(tmp_path, torch.float64, torch.float64, 1 / 3)
    for most in (None, 1e6):
        assert loaded(root, torch.float64, most).state_dict()[NORM][0] == 1 / 3


def test_what_to_set_is_something_that_helps(tmp_path):
    root = stored(tmp_path / "a", torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="model.dtype=bfloat16: the weights .*max_memory_gb=1e-09: set it to more"):
        loaded(root, torch.bfloat16, 1)
    with pytest.raises(ConfigError, match="model.dtype=float32: .*max_memory_gb=1e-09: set model.dtype=bfloat16"):
        loaded(root, torch.float32, 1)
    root = stored(tmp_path / "b", torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="are float8_e4m3fn, .* set it to more"):
        loaded(root, torch.float32, 1)
    root = stored(tmp_path / "c", torch.float16, torch.float32, 1e6)
    with pytest.raises(ConfigError, match=rf"{NORM} of .*{FILE} holds 1e\+06, .*set model.dtype=bfloat16 or float32"):
        loaded(root, torch.float16, 1e6)


def test_what_a_run_puts_before_every_name_is_taken_off_there_too(tmp_path):
    root = stored(tmp_path, torch.bfloat16)
    plain = loaded(root, torch.bfloat16).state_dict()
    path = root / "unet" / FILE
    save_file({f"module.{name}": value for name, value in plain.items()}, path, {"format": "pt"})
    found = loaded(root, torch.bfloat16, 1).state_dict()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in plain.items())


@pytest.mark.parametrize(("make", "component"), [(latent_folder, "vqvae"), (dit_folder, "vae")])
def test_a_first_stage_has_a_type_that_nobody_chooses(tmp_path, make, component):
    root = make(tmp_path)
    path = root / component / FILE
    save_file({name: value.half() for name, value in load_file(path).items()}, path, {"format": "pt"})
    message = f"model.checkpoint=.*{component}: the weights .* are float16, .* set it to more than that"
    with mapped_weights(1), pytest.raises(ConfigError, match=message):
        load_model("diffusers", str(root))


def pickled(root, kind, zipped):
    """The same weights in a file of torch, in its format of today or in that of earlier versions."""
    path = stored(root, kind) / "unet" / FILE
    torch.save(load_file(path), path.with_suffix(".bin"), _use_new_zipfile_serialization=zipped)
    path.unlink()
    return root


def test_pickles_that_are_read_whole_need_room(tmp_path):
    root = pickled(tmp_path, torch.float32, zipped=False)
    size = (root / "unet" / "diffusion_pytorch_model.bin").stat().st_size
    message = (
        rf"model.checkpoint={root}/unet: diffusion_pytorch_model.bin is a pickle .* read whole: .* GB are more than "
        r"trainer.max_memory_gb=.*: save the weights as safetensors \(save_pretrained"
    )
    with pytest.raises(ConfigError, match=message):
        loaded(root, torch.float32, size - 1)
    found, expected = loaded(root, torch.float32, size), loaded(root, torch.float32)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_pickles_of_today_stay_in_their_files(tmp_path, kind):
    root = pickled(tmp_path, kind, zipped=True)
    found, expected = loaded(root, kind, 1), loaded(root, kind)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert {value.dtype for value in found.parameters()} == {kind}
    if Path("/proc/self/maps").exists():
        assert {mapped_file(value) for value in found.parameters()} == {root / "unet" / "diffusion_pytorch_model.bin"}
    other = torch.float16
    with pytest.raises(ConfigError, match="model.dtype=float16: .*max_memory_gb=1e-09: set model.dtype="):
        loaded(root, other, 1)


def mapped_file(tensor):
    """The file whose pages the elements of `tensor` are; None = they lie in memory."""
    for row in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = row.split()
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return Path(name) if name.startswith("/") else None
    return None
