"""Bad numbers in what a run is given end it before the first image, in one line with file, tensor and setting."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_folders import autoencoder, ddim, latent_folder, pixel_folder, unet

import ptq_exp
from ptq_exp.errors import CheckpointError, ConfigError, DataError, PTQError
from ptq_exp.experiment import experiment

FOLDER = ("model=diffusers", "evaluation=paired", "metric=minmax", "logger=none", "bits=w8a8")
DIGITS = ("metric=minmax", "logger=none", "bits=w8a8")


@pytest.fixture(autouse=True)
def no_images_are_drawn(monkeypatch):
    def drawn(*arguments):
        raise AssertionError("images of full precision were drawn")

    monkeypatch.setattr(experiment, "full_precision_images", drawn)


def spoiled(module, name, value=float("nan")):
    with torch.no_grad():
        module.get_parameter(name).view(-1)[3] = value
    return module


def in_order(line, *parts):
    assert re.search(".*".join(map(re.escape, parts)), line), line


def test_nan_in_a_network(tmp_path, refused):
    folder = pixel_folder(tmp_path / "m", ddim(), network=spoiled(unet(), "mid_block.resnets.0.conv1.weight"))
    line = refused(*FOLDER, f"model.checkpoint={folder}")
    in_order(line, f"model.checkpoint={folder}/unet/diffusion_pytorch_model.safetensors:",
             "mid_block.resnets.0.conv1.weight", "NaN or infinity in 1 of 2304 values")


def test_nan_in_a_first_stage(tmp_path):
    stage = spoiled(autoencoder(), "decoder.conv_in.bias", float("inf"))
    folder = latent_folder(tmp_path / "m", ddim(), first_stage=stage)
    with pytest.raises(CheckpointError) as refusal:
        ptq_exp.load_model("diffusers", folder)
    file = f"{folder}/vqvae/diffusion_pytorch_model.safetensors"
    in_order(str(refusal.value), f"model.checkpoint={file}: decoder.conv_in.bias")


@pytest.mark.parametrize(("saved", "file"), [
    ({"safe_serialization": False}, r"diffusion_pytorch_model\.bin"),
    ({"max_shard_size": "60KB"}, r"diffusion_pytorch_model-0000\d-of-0000\d\.safetensors"),
])
def test_the_file_is_named_however_it_is_stored(saved, file, tmp_path):
    spoiled(unet(), "conv_in.bias").save_pretrained(tmp_path, **saved)
    with pytest.raises(CheckpointError, match=rf"model\.checkpoint={tmp_path}/{file}: conv_"):
        ptq_exp.load_model("diffusers", str(tmp_path))


def test_weights_beyond_float16(tmp_path, refused):
    folder = pixel_folder(tmp_path / "m", ddim(), network=spoiled(unet(), "conv_in.weight", -3e5))
    line = refused(*FOLDER, f"model.checkpoint={folder}", "model.dtype=float16")
    remedy = "model.dtype=bfloat16 or float32"
    in_order(line, "model.dtype=float16: unet.conv_in.weight", str(folder), "-300000", remedy)
    narrow = ptq_exp.load_model("diffusers", folder, dtype="bfloat16").denoiser.unet
    assert narrow.conv_in.weight.dtype == torch.bfloat16
    border = pixel_folder(tmp_path / "border", ddim(), network=spoiled(unet(), "conv_in.weight", 65519.0))
    assert ptq_exp.load_model("diffusers", border, dtype="float16")  # rounds to the largest number, 65504


def test_embedded_models_say_it_too(tmp_path):
    from safetensors.torch import load_file, save_file

    from ptq_exp.embedded.weights_file import WEIGHTS

    for name, file in (("digits", "digits_unet"), ("digits_ldm", "digits_latent_unet")):
        state = load_file(WEIGHTS / f"{file}.safetensors")
        key = next(key for key in state if key.endswith("conv_in.weight"))
        state[key].view(-1)[0] = 1e6
        save_file(state, tmp_path / f"{file}.safetensors")
        with pytest.raises(ConfigError, match=rf"model.dtype=float16: .*conv_in.weight of model.checkpoint={tmp_path}"):
            ptq_exp.load_model(name, str(tmp_path / f"{file}.safetensors"), dtype="float16")


def test_activations_beyond_float16(tmp_path, refused):
    """Weights that float16 holds, but whose products it does not."""
    network = unet()
    with torch.no_grad():
        network.conv_in.weight.fill_(30000)
    folder = pixel_folder(tmp_path / "m", ddim(), network=network)
    line = refused(*FOLDER, f"model.checkpoint={folder}", "model.dtype=float16")
    in_order(line, "model.dtype=float16: the network gives NaN or infinity at time 666,",
             "first in the output of unet.conv_in", "set model.dtype=bfloat16 or float32")


def test_a_network_that_overflows_in_float32(tmp_path, refused):
    network = unet()
    with torch.no_grad():
        network.conv_out.weight.fill_(3e38)
    folder = pixel_folder(tmp_path / "m", ddim(), network=network)
    line = refused(*FOLDER, f"model.checkpoint={folder}")
    in_order(line, f"model.checkpoint={folder}: the network gives NaN or infinity at time 666, first in",
             "unet.conv_out")


@pytest.mark.parametrize(("betas", "said"), [
    ({"beta_end": float("nan")}, "scheduler_config.json: beta_end=NaN"),
    ({"num_train_timesteps": 30, "trained_betas": [0.1, -0.5, 0.2] * 10}, "trained_betas"),
    ({"beta_end": 2.0}, "beta_end"), ({"beta_start": -1.0}, "beta_start"),
])
def test_a_schedule_that_is_none(betas, said, tmp_path):
    folder = pixel_folder(tmp_path / "m", ddim(**betas))
    with pytest.raises(PTQError, match=rf"model.checkpoint={folder}.*{said}"):
        ptq_exp.load_model("diffusers", folder)


def own_model(*, name, checkpoint=None, dtype="float32"):
    """A builder of somebody's own, whose weights are NaN."""
    model = ptq_exp.load_model("digits")
    spoiled(model.denoiser, "unet.conv_in.bias")
    return model


def test_an_own_builder(refused, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "own_builder", sys.modules[__name__])
    line = refused(*DIGITS, "model.build._target_=own_builder.own_model")
    in_order(line, "model.build=own_builder.own_model: unet.conv_in.bias holds NaN")


def gaussian(**arrays):
    rng = np.random.default_rng(0)
    x, s = rng.normal(size=(200, 64)), rng.normal(size=(200, 112))
    return {"mu": x.mean(0), "sigma": np.cov(x.T), "mu_s": s.mean(0), "sigma_s": np.cov(s.T)} | arrays


SYMMETRIC = np.random.default_rng(1).normal(size=(64, 64))
STATISTICS = [
    ({"mu": np.full(64, np.nan)}, "mu holds NaN or infinity in 64 of 64"),
    ({"sigma": np.where(np.eye(64) > 0, np.inf, 0)}, "sigma holds NaN or infinity"),
    ({"sigma_s": np.full((112, 112), np.nan)}, "sigma_s holds NaN or infinity"),
    ({"sigma": SYMMETRIC}, "sigma is not symmetric"),
    ({"sigma": SYMMETRIC + SYMMETRIC.T}, "sigma has a negative"),
    ({"sigma": np.eye(64) - 0.1}, "sigma has a negative eigenvalue"),
    ({"sigma": -np.eye(64)}, "sigma has a negative variance"),
    ({"sigma": np.zeros((64, 64))}, "sigma is 0 everywhere"),
    ({"sigma_s": np.zeros((112, 112))}, "sigma_s is 0 everywhere"),
    ({"mu": np.zeros(63), "sigma": np.eye(63)}, "63 pooled features, digits-"),
    ({"sigma": np.eye(63)}, "sigma"),
]


@pytest.mark.parametrize(("arrays", "said"), STATISTICS, ids=lambda x: x if isinstance(x, str) else "")
def test_statistics_that_are_none(arrays, said, tmp_path, refused):
    np.savez(tmp_path / "stats.npz", **gaussian(**arrays))
    line = refused(*DIGITS, f"evaluation.reference={tmp_path}/stats.npz")
    assert said in line and "evaluation.reference" in line and ("stats.npz" in line)


def test_sound_statistics_pass(tmp_path):
    """Singular ones, too: of fewer images than features, in float32."""
    from ptq_exp.embedded.load import DigitsExtractor
    from ptq_exp.evaluation import load_reference

    x = np.random.default_rng(2).normal(size=(20, 64)).astype(np.float32)
    np.savez(tmp_path / "stats.npz", **gaussian(mu=x.mean(0), sigma=np.cov(x.T).astype(np.float32)))
    assert load_reference(tmp_path / "stats.npz", DigitsExtractor()).sizes == (64, 112)


IMAGES = [
    (np.full((4, 16, 16, 1), 0.5, np.float32), "arr_0 is float32 .* with values 0.5 to 0.5; expected images uint8"),
    (np.full((4, 16, 16, 1), np.nan), "arr_0 is float64 .* with values nan"),
    (np.full((4, 16, 16, 1), 999, np.uint16), "arr_0 is uint16 .* with values 999 to 999"),
    (np.zeros((4, 16, 16), np.uint8), "arr_0 is uint8 of shape .4, 16, 16."),
    (np.zeros((4, 16, 16, 3), np.uint8), "scores digits of 16x16x1"),
    (np.zeros((0, 16, 16, 1), np.uint8), "arr_0 is uint8 of shape .0"),
]


@pytest.mark.parametrize(("array", "said"), IMAGES, ids=lambda x: x if isinstance(x, str) else "")
def test_arrays_that_are_no_images(array, said, tmp_path, refused):
    np.savez(tmp_path / "real.npz", arr_0=array)
    line = refused(*DIGITS, f"evaluation.reference={tmp_path}/real.npz")
    assert re.search(said, line) and "evaluation" in line


def folder_of_images(folder, size=(16, 16), n=40):
    folder.mkdir()
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 255, size[::-1]).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-150])


REFERENCE, CALIBRATION = ("evaluation.reference={}",), (
    "calibration.source=raw", "model.images._target_=ptq_exp.evaluation.open_images", "+model.images.path={}",
)


@pytest.mark.parametrize(("settings", "setting"), [(REFERENCE, "evaluation.reference"),
                                                     (CALIBRATION, "model.images.path")])
@pytest.mark.parametrize("damage", ["cut", "empty", "sizes", "none"])
def test_folders_of_images(settings, setting, damage, tmp_path, refused):
    folder = folder_of_images(tmp_path / "real")
    said = "real"
    if damage == "cut":
        for path in folder.iterdir():
            cut(path)
        said = ".png cannot be read as an image"
    elif damage == "empty":
        for path in folder.iterdir():
            path.unlink()
        said = "real: found no images"
    elif damage == "sizes":
        Image.new("L", (20, 16)).save(folder / "07.png")
        said = "07.png is 20x16, but 00.png is 16x16"
    else:
        (folder / "03.png").write_bytes(b"")
        said = "03.png cannot be read as an image"
    line = refused(*DIGITS, *(setting.format(folder) for setting in settings))
    assert said in line and setting in line, line


def test_images_of_another_size_than_the_model(tmp_path, refused):
    folder = folder_of_images(tmp_path / "real", (32, 32))
    line = refused(*DIGITS, *(setting.format(folder) for setting in CALIBRATION))
    assert "uint8 [32, 32, 1]" in line and "[16, 16, 1]: set model.images.path" in line


def statistics_file(path, steps=3, channels=1, **changes):
    from ptq_exp.correction import NoiseStatistics

    names = ("k", "residual_std", "r", "kurtosis", "k_stderr", "k_unshrunk", "counts")
    arrays = {name: torch.ones(steps) for name in names} | {
        name: torch.ones(steps, channels) for name in ("bias", "bias_stderr")
    }
    for name, value in changes.items():
        arrays[name].view(-1)[-1] = value
    NoiseStatistics(**arrays, made_for={}).save(path)


@pytest.mark.parametrize(("changes", "said"), [
    ({"k": float("nan")}, "k holds NaN"), ({"r": float("nan")}, "r holds NaN"), ({"bias": float("inf")}, "bias holds"),
    ({"residual_std": -0.5}, "residual_std holds -0.5, which is never negative"),
    ({"k_stderr": float("nan")}, "k_stderr"),
    ({}, "was made for another"),
])
def test_noise_statistics(changes, said, tmp_path, refused):
    statistics_file(tmp_path / "noise.npz", **changes)
    line = refused(*DIGITS, "correction=ptqd", f"correction.statistics={tmp_path}/noise.npz")
    in_order(line, f"correction.statistics={tmp_path}/noise.npz", said)


def test_standard_errors_of_one_sample_are_infinite(tmp_path):
    from ptq_exp.correction import NoiseStatistics

    statistics_file(tmp_path / "noise.npz", k_stderr=float("inf"), bias_stderr=float("inf"))
    assert len(NoiseStatistics.load(tmp_path / "noise.npz")) == 3


def test_a_bit_schedule(tmp_path, refused):
    (tmp_path / "bits.json").write_text('{"weight": 8, "activation": [8, 8, 8], "timesteps": [1, 2, NaN]}')
    line = refused(*DIGITS, "bits=step_list", f"bits.schedule={tmp_path}/bits.json")
    in_order(line, f"bits.schedule={tmp_path}/bits.json is no bit schedule", "nan")


class Broken:
    """An extractor that gives NaN for one image."""

    name, preprocessing = "broken", "none"

    def __call__(self, images):
        pooled = images.reshape(len(images), -1)[:, :4].astype(np.float32)
        pooled[-1, 2] = np.nan
        return pooled, np.zeros((len(images), 7, 2, 2), np.float32), pooled[:, :3] * 0


def test_an_extractor_that_gives_nan():
    from ptq_exp.evaluation import extract_features

    line = "evaluation.extractor=broken: gives NaN or infinity in the features of image 4 of x"
    with pytest.raises(DataError, match=line):
        extract_features(Broken(), np.zeros((5, 4, 4, 1), np.uint8), name="x")


def test_weights_of_the_extractor(tmp_path):
    from ptq_exp.evaluation import InceptionExtractor

    torch.save({"Conv2d_1a_3x3.conv.weight": torch.tensor([1, float("nan")])}, tmp_path / "inception.pth")
    with pytest.raises(CheckpointError) as refusal:
        InceptionExtractor(str(tmp_path / "inception.pth"))
    in_order(str(refusal.value), f"evaluation.weights={tmp_path}/inception.pth: Conv2d_1a_3x3.conv.weight holds NaN")


def test_infinity_in_a_buffer_is_a_mask():
    from ptq_exp.diffusion.zoo.registry import check_numbers

    model = ptq_exp.load_model("digits")
    model.denoiser.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    check_numbers(model, "here")
    model.denoiser.mask[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="^here: mask holds NaN"):
        check_numbers(model, "here")


def test_a_network_is_left_as_it_was():
    from ptq_exp.diffusion import check_network

    model = ptq_exp.load_model("digits_ldm", dtype="bfloat16")
    before = torch.random.get_rng_state()
    check_network(model, model.time_grid(), 0)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.denoiser.modules()]
    assert set(hooks) == {(0, 0)} and torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("dtype", "said"), [
    ("float16", r"^model.dtype=float16: .* at time [0-9.]+, first in the input of unet.conv_norm_out"),
    ("float32", r"^model.checkpoint=None: .* at time [0-9.]+, first in the input of unet.conv_norm_out"),
])
def test_what_happens_between_layers_is_found(dtype, said):
    """Overflow in a function, not in a module; `sample` says it, too."""
    model = ptq_exp.load_model("digits", dtype=dtype)
    model.denoiser.unet.up_blocks[-1].resnets[-1].output_scale_factor = 0.0
    with pytest.raises((ConfigError, CheckpointError), match=said):
        ptq_exp.sample(model, 1, steps=1)
