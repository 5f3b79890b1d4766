"""Ten steps from a diffusers folder are those of diffusers: its schedulers, solvers, pipelines and autoencoders."""

import importlib
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, LDMPipeline
from small_folders import AUTOENCODERS, BETAS, autoencoder, dit_folder, latent_folder, pixel_folder, transformer, unet

from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.diffusion.zoo.scheduler import KNOWN, read_scheduler
from ptq_exp.diffusion.zoo.settings import Settings

STEPS, SEED, INDICES = 10, 3, range(2)


def noise(shape):
    return SampleNoise(SEED, INDICES, shape)


def states(model, **grid):
    return model.run(model.denoiser, model.time_grid(STEPS, **grid), INDICES, SEED)


def assert_same(found, expected):
    assert float(expected.std()) > 0.03, "nothing to compare"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def walked(scheduler, network, draws, **step):
    """States after STEPS steps, as all pipelines of diffusers walk them."""
    scheduler.set_timesteps(STEPS)
    x = draws.draw() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x, **step).prev_sample
    return x


@pytest.mark.parametrize("name", KNOWN)
def test_every_scheduler_that_loads_is_sampled_as_ddim_of_its_settings(tmp_path, name):
    """With the defaults of its class, which are not those of DDIM, and a spacing that DDIM walks evenly."""
    own = getattr(diffusers, name)(**BETAS)
    model = load_model("diffusers", str(pixel_folder(tmp_path, own)))
    assert model.clip_sample == (name.startswith(("DDIM", "DDPM")))
    assert model.sampler.spacing == own.config.get("timestep_spacing", "linspace")
    ddim = DDIMScheduler.from_config(own.config, timestep_spacing="leading", clip_sample=model.clip_sample,
                                     set_alpha_to_one=name != "PNDMScheduler")
    # DDPM has its mean from x and the clipped x0, which is to derive eps again
    expected = walked(ddim, unet(), noise((3, 8, 8)), use_clipped_model_output="DDPM" in name)
    assert_same(states(model, spacing="leading"), expected)


@pytest.mark.parametrize("name", KNOWN)
def test_absent_settings_mean_what_the_class_takes(name):
    """`_class_name` alone: Heun, for one, has other betas than DDIM."""
    for settings in ({}, {"num_train_timesteps": 20, "trained_betas": [0.01] * 20}):
        own = getattr(diffusers, name)(**settings)
        file = Settings(Path("folder"), "scheduler_config.json", {"_class_name": name, **settings})
        schedule = read_scheduler(file).schedule
        assert torch.equal(schedule.alphas_cumprod, own.alphas_cumprod.double())
        ends = own.config.get("set_alpha_to_one", True)
        assert schedule.final_alpha_cumprod == (1.0 if ends else float(own.alphas_cumprod[0]))
        assert schedule.steps_offset == own.config.get("steps_offset", 0)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_pipelines(tmp_path, monkeypatch, spacing, clip):
    """In `linspace` a DDIM of diffusers steps by T // steps, not to its next time."""
    settings = {"timestep_spacing": spacing, "clip_sample": clip, "steps_offset": 1, "set_alpha_to_one": False}
    root = pixel_folder(tmp_path, DDIMScheduler(**settings, **BETAS), DDIMPipeline)
    model = load_model("diffusers", str(root))
    found = states(model)
    assert_same(found, walked(DDIMScheduler(**settings, **BETAS), unet(), noise((3, 8, 8))))
    assert_same((found / 2 + 0.5).clamp(0, 1), images(monkeypatch, DDIMPipeline, root, (3, 8, 8)))


def images(monkeypatch, pipeline, root, shape, **call):
    """Images of the pipeline itself, [N, C, H, W] in [0, 1], from our noise."""
    monkeypatch.setattr(importlib.import_module(pipeline.__module__), "randn_tensor",
                        lambda *_, **__: noise(shape).draw())
    made = pipeline.from_pretrained(root)
    made.set_progress_bar_config(disable=True)
    if pipeline is not DiTPipeline:
        call["batch_size"] = len(INDICES)
    return torch.from_numpy(made(num_inference_steps=STEPS, output_type="np", **call)[0]).permute(0, 3, 1, 2)


def test_trailing_times_that_do_not_divide_the_schedule(tmp_path):
    own = DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=997, **BETAS)
    model = load_model("diffusers", str(pixel_folder(tmp_path, own)))
    assert_same(states(model), walked(own, unet(), noise((3, 8, 8))))


def test_ddpm_is_eta_of_one(tmp_path, monkeypatch):
    """Every step of Ho et al. with the same noise, x0 clipped; no noise in the last one."""
    own = DDPMScheduler(**BETAS)
    model = load_model("diffusers", str(pixel_folder(tmp_path, own)))
    draws = noise((3, 8, 8))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: draws.draw())
    assert_same(states(model, eta=1.0), walked(own, unet(), draws))


@pytest.mark.parametrize(
    ("solver", "name", "settings"),
    [
        ("dpm_solver", "DPMSolverMultistepScheduler", {}),
        ("dpm_solver", "DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("dpm_solver", "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("dpm_solver", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
    ],
)
def test_solvers_of_the_folder(tmp_path, solver, name, settings):
    own = getattr(diffusers, name)(**settings, **BETAS)
    model = load_model("diffusers", str(latent_folder(tmp_path, own)))
    grid = model.time_grid(STEPS, solver=solver)
    found = model.run(model.denoiser, grid, INDICES, SEED)
    assert_same(found, walked(own, unet(), noise((3, 8, 8))))


@pytest.mark.parametrize("which", AUTOENCODERS)
def test_latent_pipelines(tmp_path, monkeypatch, which):
    root = latent_folder(tmp_path, which=which)
    model = load_model("diffusers", str(root))
    decoded = model.sample(model.denoiser, model.time_grid(STEPS), INDICES, SEED)
    assert tuple(decoded.shape[1:]) == model.image_shape
    assert_same((decoded / 2 + 0.5).clamp(0, 1), images(monkeypatch, LDMPipeline, root, (3, 8, 8)))


@torch.no_grad()
@pytest.mark.parametrize("which", AUTOENCODERS)
def test_encoders(tmp_path, which):
    """Latents are those that the autoencoder gives, times its factor."""
    model = load_model("diffusers", str(latent_folder(tmp_path, which=which)))
    stage = autoencoder(which)
    x = torch.randn(1, *model.image_shape, generator=torch.Generator().manual_seed(5))
    encoded = stage.encode(x, return_dict=False)[0]
    latents = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    torch.testing.assert_close(model.encode(x), latents * stage.config.scaling_factor, rtol=1e-5, atol=1e-5)
    assert tuple(latents.shape[1:]) == model.sample_shape


@pytest.mark.parametrize("which", ["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit_pipelines(tmp_path, monkeypatch, which, guidance):
    root = dit_folder(tmp_path, which=which)
    model = load_model("diffusers", str(root))
    denoiser = model.guided(model.denoiser, guidance)
    decoded = model.sample(denoiser, model.time_grid(STEPS), INDICES, SEED)
    labels = model.labels(INDICES, SEED).tolist()
    expected = images(monkeypatch, DiTPipeline, root, (3, 8, 8), class_labels=labels, guidance_scale=guidance)
    assert_same((decoded / 2 + 0.5).clamp(0, 1), expected)


@pytest.mark.parametrize("out", [6, 3, None])
def test_dit_with_and_without_learned_variance(tmp_path, out):
    model = load_model("diffusers", str(dit_folder(tmp_path, out_channels=out)))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([999, 3]), torch.tensor([4, 1000])
    with torch.no_grad():
        expected = transformer(out_channels=out)(x, timestep=t, class_labels=y).sample[:, :3]
        torch.testing.assert_close(model.denoiser(x, t.float(), y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [
    {"center_input_sample": True}, {"freq_shift": 1, "flip_sin_to_cos": False},
    {"resnet_time_scale_shift": "scale_shift"}, {"sample_size": [8, 16]},
])
def test_settings_of_the_network(tmp_path, settings):
    model = load_model("diffusers", str(pixel_folder(tmp_path, **settings)))
    expected = walked(DDIMScheduler(**BETAS), unet(**settings), noise(model.sample_shape))
    assert_same(states(model), expected)


def test_pipelines_that_make_their_own_scheduler(tmp_path, monkeypatch):
    """DDIMPipeline makes a DDIM of the settings of any: x0 is clipped then, as that class has it."""
    own = DDPMScheduler(clip_sample=True, **BETAS)
    pixel_folder(tmp_path / "ddpm", own, DDPMPipeline)
    root = pixel_folder(tmp_path / "ddim", own, DDPMPipeline)
    path = root / "model_index.json"
    path.write_text(path.read_text().replace("DDPMPipeline", "DDIMPipeline"))
    model = load_model("diffusers", str(root))
    assert_same((states(model) / 2 + 0.5).clamp(0, 1), images(monkeypatch, DDIMPipeline, root, (3, 8, 8)))
    assert model.digest != load_model("diffusers", str(tmp_path / "ddpm")).digest
