"""Both CIFAR-10 networks against the outputs of their original code, from files in the original containers."""

import pytest
import torch

from ptq_exp.diffusion.zoo.registry import load_model

FLOAT32, FLOAT64 = 1e-4, 1e-9


@pytest.fixture(scope="module")
def ddim(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("ddim") / "cifar10_uncond_50M_500K.pt"
    torch.save(golden.state("iddpm_cifar10"), path)
    model = load_model("ddim_cifar10", str(path))
    path.unlink()
    return model


@pytest.fixture(scope="module")
def ddpm(golden, tmp_path_factory):
    """From a training list of a data-parallel run, whose last entry holds the averaged weights."""
    path = tmp_path_factory.mktemp("ddpm") / "ckpt.pth"
    hollow = {f"module.{key}": value for key, value in golden.hollow("ddim_cifar10").items()}
    averaged = {f"module.{key}": value for key, value in golden.state("ddim_cifar10").items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save([hollow, optimizer, 7, 790000, averaged], path)
    model = load_model("ddpm_cifar10", str(path))
    path.unlink()
    return model


def whole(denoiser):
    """The network with all its output channels."""
    return lambda x, t: denoiser.unet(x, t).sample


def test_improved_diffusion_in_float32(ddim, golden):
    assert golden.deviation(whole(ddim.denoiser), "iddpm_cifar10") < FLOAT32


def test_improved_diffusion_in_float64(ddim, golden, portable_sines):
    assert golden.deviation(whole(ddim.copy_denoiser().double()), "iddpm_cifar10.f64", torch.float64) < FLOAT64


def test_improved_diffusion_with_small_weights(ddim, golden, shrink):
    copied = ddim.copy_denoiser()
    shrink(copied, float(golden.file("iddpm_cifar10.small")["weight_scale"]))
    assert golden.deviation(whole(copied), "iddpm_cifar10.small") < FLOAT32


def test_the_denoiser_returns_the_noise_and_not_the_variance(ddim, golden):
    x, t = golden.inputs(golden.file("iddpm_cifar10"), 0)
    eps = ddim.denoiser(x, t)
    assert torch.equal(eps, ddim.denoiser.unet(x, t).sample[:, :3])


def test_improved_diffusion_as_a_model(ddim):
    assert (ddim.sample_shape, ddim.image_shape, ddim.clip_sample) == ((3, 32, 32), (3, 32, 32), True)
    assert sum(p.numel() for p in ddim.denoiser.parameters()) == 52_546_438
    assert not ddim.denoiser.training and not any(p.requires_grad for p in ddim.denoiser.parameters())
    grid = ddim.time_grid()
    assert len(grid) == 250 and float(grid.timesteps[0]) == 999.75 and float(grid.alphas_cumprod_prev[-1]) == 1
    assert len(ddim.digest) == 64


def test_ddpm_in_float32(ddpm, golden):
    assert golden.deviation(ddpm.denoiser, "ddim_cifar10") < FLOAT32


def test_ddpm_in_float64(ddpm, golden, portable_sines):
    assert golden.deviation(ddpm.copy_denoiser().double(), "ddim_cifar10.f64", torch.float64) < FLOAT64


def test_ddpm_with_small_weights(ddpm, golden, shrink):
    copied = ddpm.copy_denoiser()
    shrink(copied, float(golden.file("ddim_cifar10.small")["weight_scale"]))
    assert golden.deviation(copied, "ddim_cifar10.small") < FLOAT32


def test_ddpm_as_a_model(ddpm):
    assert (ddpm.sample_shape, ddpm.clip_sample, ddpm.schedule.final_alpha_cumprod) == ((3, 32, 32), False, 1.0)
    assert sum(p.numel() for p in ddpm.denoiser.parameters()) == 35_746_307
    grid = ddpm.time_grid()
    assert len(grid) == 100 and float(grid.timesteps[0]) == 800 and float(grid.timesteps[-1]) == 0


def test_ddpm_from_its_diffusers_folder(ddpm, golden, tmp_path):
    ddpm.denoiser.unet.save_pretrained(tmp_path / "unet")
    model = load_model("ddpm_cifar10", str(tmp_path))
    assert golden.deviation(model.denoiser, "ddim_cifar10") < FLOAT32
    assert len(model.digest) == 64 and model.digest != ddpm.digest


def test_a_reduced_type_is_close_and_keeps_the_state_in_float32(ddpm, golden, saved):
    low = load_model("ddpm_cifar10", saved(golden.state("ddim_cifar10")), dtype="bfloat16")
    assert {p.dtype for p in low.denoiser.parameters()} == {torch.bfloat16}
    x, t = golden.inputs(golden.file("ddim_cifar10"), 0)
    eps, expected = low.denoiser(x, t), ddpm.denoiser(x, t)
    assert eps.dtype == torch.float32
    assert 0 < float((eps - expected).std() / expected.std()) < 0.05
