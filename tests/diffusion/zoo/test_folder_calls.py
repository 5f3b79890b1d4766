"""Folders whose networks predict v or x0, or take labels and embedded prompts."""

import importlib

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from small_calls import WIDTH, bare_folder, conditional_unet, labelled_conditional_unet, tokens
from small_folders import BETAS, latent_folder, pixel_folder, unet

from ptq_exp.diffusion import sample
from ptq_exp.diffusion.noise import SampleNoise
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import CheckpointError, ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.tensor([7.0, 900.0])


class Drawn:
    """A source of noise that always gives X."""

    def draw(self):
        return X


@torch.no_grad()
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ten_steps_are_those_of_diffusers_in_float64(tmp_path, prediction, clip, spacing):
    own = DDIMScheduler(prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing, **BETAS)
    model = load_model("diffusers", str(pixel_folder(tmp_path, own)), dtype="float64")
    found = sample(model.denoiser, model.time_grid(10), Drawn(), clip_sample=model.clip_sample)
    own.set_timesteps(10)
    own.alphas_cumprod, own.final_alpha_cumprod = own.alphas_cumprod.double(), own.final_alpha_cumprod.double()
    x, network = X, unet().double()
    for t in own.timesteps:
        x = own.step(network(x, t).sample, t, x).prev_sample
    assert float(x.std()) > 0.1
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_images_are_those_of_the_pipeline(tmp_path, monkeypatch, prediction):
    root = pixel_folder(tmp_path, DDIMScheduler(prediction_type=prediction, **BETAS), DDIMPipeline)
    model = load_model("diffusers", str(root))
    found = model.sample(model.denoiser, model.time_grid(10), range(2), 3)
    monkeypatch.setattr(importlib.import_module(DDIMPipeline.__module__), "randn_tensor",
                        lambda *_, **__: SampleNoise(3, range(2), (3, 8, 8)).draw())
    pipeline = DDIMPipeline.from_pretrained(root)
    pipeline.set_progress_bar_config(disable=True)
    expected = torch.from_numpy(pipeline(batch_size=2, num_inference_steps=10, output_type="np").images)
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "cls", "spacing"), [
    ("dpm_solver", DPMSolverMultistepScheduler, "leading"), ("euler", EulerDiscreteScheduler, "linspace"),
])
def test_other_solvers_walk_a_v_prediction_as_their_own_schedulers_do(tmp_path, solver, cls, spacing):
    """`linspace` of Euler has times between those of the schedule."""
    settings = {"prediction_type": "v_prediction", **BETAS}
    model = load_model("diffusers", str(pixel_folder(tmp_path, DDIMScheduler(clip_sample=False, **settings))))
    grid = model.time_grid(10, spacing, solver=solver)
    found = model.run(model.denoiser, grid, range(2), 3)
    more = {"final_sigmas_type": "zero"} | ({"lambda_min_clipped": -5.1} if solver == "dpm_solver" else {})
    own = cls(timestep_spacing=spacing, steps_offset=model.schedule.steps_offset, **more, **settings)
    own.set_timesteps(10)
    x, network = SampleNoise(3, range(2), (3, 8, 8)).draw() * own.init_noise_sigma, unet()
    for t in own.timesteps:
        x = own.step(network(own.scale_model_input(x, t), t).sample, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_a_schedule_that_ends_without_signal_is_refused(tmp_path):
    own = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ConfigError, match=r"rescale_betas_zero_snr=True: alpha_bar is 0 at its last time"):
        load_model("diffusers", str(pixel_folder(tmp_path, own)))


def test_the_estimate_stays_exact_beside_a_network_of_few_bits(tmp_path):
    """alpha and sigma are those of float64 where the network computes in bfloat16."""
    own = DDIMScheduler(prediction_type="v_prediction", **BETAS)
    model = load_model("diffusers", str(pixel_folder(tmp_path, own)), dtype="bfloat16")
    x, t = X.float(), torch.full((2,), 500.0)
    level = float(own.alphas_cumprod[500])
    eps = level**0.5 * model.denoiser.network(x, t) + (1 - level) ** 0.5 * x
    torch.testing.assert_close(model.denoiser(x, t), eps, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("folder", [pixel_folder, latent_folder])
def test_class_conditional_unets(tmp_path, folder):
    model = load_model("diffusers", str(folder(tmp_path, num_class_embeds=5)))
    y, x = torch.tensor([4, 1]), X.float()
    expected = unet(num_class_embeds=5)(x, T, class_labels=y).sample
    torch.testing.assert_close(model.denoiser(x, T, y=y), expected)
    assert (model.n_classes, model.null_label) == (5, None)
    assert model.labels(range(10), 0).bincount().tolist() == [2] * 5
    with pytest.raises(ConfigError, match='has no label that means "no class"'):
        model.guided(model.denoiser, 2.0)


def test_a_network_of_one_class_has_none_to_choose(tmp_path):
    model = load_model("diffusers", str(pixel_folder(tmp_path, num_class_embeds=1)))
    expected = unet(num_class_embeds=1)(X.float(), T, class_labels=torch.zeros(2, dtype=torch.long)).sample
    torch.testing.assert_close(model.denoiser(X.float(), T), expected)
    assert model.n_classes is None and model.example_inputs().conditions == {}


@torch.no_grad()
def test_labels_of_a_file_choose_classes_and_give_guidance(tmp_path):
    """Label 4 was trained as "no class", which no folder says."""
    np.savez(tmp_path / "labels.npz", class_labels=[0, 2], **{"unconditional.class_labels": 4})
    root = str(pixel_folder(tmp_path / "model", num_class_embeds=5))
    model = load_model("diffusers", root, conditions=str(tmp_path / "labels.npz"))
    assert sorted(model.draw_conditions(range(2), 0)["class_labels"].tolist()) == [0, 2] and model.n_classes is None
    x, y, network = X.float(), torch.tensor([0, 2]), unet(num_class_embeds=5)
    uncond, cond = (network(x, T, class_labels=labels).sample for labels in (torch.tensor([4, 4]), y))
    found = model.guided(model.denoiser, 3.0)(x, T, class_labels=y)
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert model.digest != load_model("diffusers", root).digest


@torch.no_grad()
@pytest.mark.parametrize(("kind", "labels", "shape"), [
    ("timestep", np.array([3.0, 7.5]), "[K]"), ("identity", np.random.default_rng(0).random((2, 32)), "[K, channels]"),
])
def test_classes_that_are_no_labels_come_from_a_file(tmp_path, kind, labels, shape):
    root = str(pixel_folder(tmp_path / "model", class_embed_type=kind))
    with pytest.raises(ConfigError, match="the network takes class_labels, which is not in the folder: set model.cond"):
        load_model("diffusers", root)
    np.savez(tmp_path / "labels.npz", class_labels=labels)
    model = load_model("diffusers", root, conditions=str(tmp_path / "labels.npz"))
    given = torch.tensor(labels).float()
    expected = unet(class_embed_type=kind)(X.float(), T, class_labels=given).sample
    torch.testing.assert_close(model.denoiser(X.float(), T, class_labels=given), expected)


@torch.no_grad()
def test_embedded_prompts_come_from_a_file(tmp_path):
    root = bare_folder(tmp_path / "model", conditional_unet())
    with pytest.raises(ConfigError, match=rf"set model\.conditions to .* encoder_hidden_states \[K, tokens, {WIDTH}\]"):
        load_model("diffusers", str(root))
    model = load_model("diffusers", str(root), conditions=str(tokens(tmp_path / "text.npz")))
    given = model.draw_conditions(range(2), 0)["encoder_hidden_states"]
    expected = conditional_unet()(X.float(), T, encoder_hidden_states=given).sample
    torch.testing.assert_close(model.denoiser(X.float(), T, encoder_hidden_states=given), expected)
    other = load_model("diffusers", str(root), conditions=str(tokens(tmp_path / "more.npz", 3)))
    assert other.digest != model.digest
    with pytest.raises(ConfigError, match=r"has no unconditional\.encoder_hidden_states in model\.conditions"):
        model.guided(model.denoiser, 2.0)


@torch.no_grad()
def test_a_conditional_unet_without_text(tmp_path):
    model = load_model("diffusers", str(bare_folder(tmp_path, labelled_conditional_unet())))
    y = torch.tensor([3, 0])
    expected = labelled_conditional_unet()(X.float(), T, None, class_labels=y).sample
    torch.testing.assert_close(model.denoiser(X.float(), T, y=y), expected)
    assert model.n_classes == 4


def test_conditions_that_do_not_fit(tmp_path):
    root = str(bare_folder(tmp_path / "model", conditional_unet()))
    np.savez(tmp_path / "wide.npz", encoder_hidden_states=np.zeros((1, 4, WIDTH + 1)))
    with pytest.raises(CheckpointError, match=rf"encoder_hidden_states of \(1, 4, {WIDTH + 1}\)"):
        load_model("diffusers", root, conditions=str(tmp_path / "wide.npz"))
    tokens(tmp_path / "more.npz", words=np.zeros(2))
    with pytest.raises(ConfigError, match=r"takes no words; it takes encoder_hidden_states, .*class_labels"):
        load_model("diffusers", root, conditions=str(tmp_path / "more.npz"))
    with pytest.raises(ConfigError, match=r"model\.conditions: the model digits has no such option"):
        load_model("digits", conditions=str(tmp_path / "more.npz"))


def test_networks_of_more_than_tensors_are_named(tmp_path):
    network = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8
    )
    root = bare_folder(tmp_path / "model", network)
    with pytest.raises(CheckpointError, match="addition_embed_type=text_time"):
        load_model("diffusers", str(root), conditions=str(tokens(tmp_path / "text.npz")))
