"""Settings of a diffusers folder that cannot be followed: one line that names the file and the setting, at building."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from small_folders import BETAS, dit_folder, edit, latent_folder, pixel_folder

from ptq_exp.diffusion.zoo import first_stage
from ptq_exp.diffusion.zoo import folder as zoo_folder
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import PTQError

SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
INFINITE = float("inf")
MANY = 50_000_000


def message(root):
    with pytest.raises(PTQError) as caught:
        load_model("diffusers", str(root))
    text = str(caught.value)
    assert text.startswith(f"model.checkpoint={root}") and "\n" not in text and len(text) < 700
    return text


@pytest.fixture
def weights_are_not_read(monkeypatch):
    """Settings are judged before anything large is loaded."""
    for module in (zoo_folder, first_stage):
        monkeypatch.setattr(module, "load_component", lambda *_: pytest.fail("read the weights"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders to copy: saving takes longer than refusing."""
    root = tmp_path_factory.mktemp("saved")
    return pixel_folder(root / "pixel"), latent_folder(root / "latent", which="AutoencoderKL")


@pytest.fixture
def pixel(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.fixture
def latent(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("DDIM", {"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
        ("UniPCMultistep", {"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
        ("EulerDiscrete", {"prediction_type": "unheard"}, "only models with prediction_type=epsilon or v_pred"),
        ("DPMSolverMultistep", {"thresholding": True}, "thresholding=True"),
        ("DEISMultistep", {"thresholding": True}, "thresholding=True"),
        ("EulerDiscrete", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("DDPM", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("HeunDiscrete", {"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ("EulerDiscrete", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("LMSDiscrete", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ("HeunDiscrete", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ("UniPCMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "timestep_type=continuous"),
        ("EulerDiscrete", {"interpolation_type": "log_linear"}, "interpolation_type=log_linear"),
        ("EulerDiscrete", {"sigma_max": 20.0}, "sigma_max=20.0"),
        ("EulerDiscrete", {"final_sigmas_type": "half"}, 'final_sigmas_type="half"'),
        ("PNDM", {"timestep_spacing": "quad"}, 'timestep_spacing="quad"'),
        ("DDIM", {"beta_schedule": "sigmoid"}, "unknown beta_schedule=sigmoid"),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, "cannot be made from it"),
    ],
)
def test_what_a_scheduler_may_not_say(pixel, weights_are_not_read, name, changes, expected):
    root, kind = pixel, f"{name}Scheduler"
    (root / SCHEDULER).write_text(json.dumps({"_class_name": kind, **changes}))
    text = message(edit(root, INDEX, scheduler=["diffusers", kind]))
    assert f"{root}: {SCHEDULER}: " in text and expected in text


@pytest.mark.parametrize("name", [
    "LCMScheduler", "TCDScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler",
    "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "RePaintScheduler", "ScoreSdeVeScheduler", "Unheard",
])
def test_schedulers_that_are_not_known(pixel, name):
    root = edit(pixel, SCHEDULER, _class_name=name)
    edit(root, INDEX, scheduler=["diffusers", name])
    assert f"its scheduler ({name}) has no betas, or times of its own; known are DDIMScheduler" in message(root)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"beta_start": "0.0001"}, 'beta_start="0.0001": DDIMScheduler takes a number'),
        ({"beta_end": None}, "beta_end=null"), ({"beta_end": INFINITE}, "beta_end=Infinity"),
        ({"beta_start": 0.02, "beta_end": 0.0001}, "beta_start=0.02, beta_end=0.0001"),
        ({"beta_end": 1.5}, "beta_end=1.5"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"beta_start": [0.1]}, "beta_start=[0.1]"),
        ({"beta_start": 0.99, "beta_end": 0.99}, "leave no signal"),
        ({"num_train_timesteps": "1000"}, "a whole number"), ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": -5}, "num_train_timesteps=-5"), ({"num_train_timesteps": MANY}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps=true"), ({"num_train_timesteps": None}, "a whole number"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
        ({"num_train_timesteps": [1]}, "num_train_timesteps"),
        ({"steps_offset": None}, "steps_offset=null"), ({"steps_offset": -1}, "steps_offset=-1: choose 0..999"),
        ({"steps_offset": 1000}, "steps_offset=1000"), ({"clip_sample": "false"}, 'clip_sample="false"'),
        ({"clip_sample": None}, "clip_sample=null"), ({"set_alpha_to_one": "no"}, "true or false"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, num_train_timesteps=1000"),
        ({"trained_betas": [0.1, "a"], "num_train_timesteps": 2}, "trained_betas"),
        ({"trained_betas": [0.1, 1.2], "num_train_timesteps": 2}, "trained_betas: betas lie between 0 and 1"),
        ({"trained_betas": "none"}, "a list of numbers"), ({"trained_betas": []}, "trained_betas has 0 values"),
        ({"beta_schedule": 3}, "beta_schedule=3"), ({"beta_schedule": None}, "beta_schedule=null"),
        ({"timestep_spacing": None}, "timestep_spacing=null"), ({"timestep_spacing": ["leading"]}, "timestep_spacing"),
        ({"prediction_type": 0}, "prediction_type=0"),
        ({"_class_name": "PNDMScheduler"}, "model_index.json names DDIM"),
        ({"_class_name": ["DDIMScheduler"]}, "known are DDIMScheduler"),
        ({"_class_name": 3}, "known are DDIMScheduler"),
    ],
)
def test_impossible_settings_of_a_scheduler(pixel, weights_are_not_read, changes, expected):
    root = edit(pixel, SCHEDULER, **changes)
    text = message(root)
    assert f"{root}: {SCHEDULER}: " in text and expected in text


def test_the_class_may_stand_in_the_index_alone(tmp_path):
    root = edit(pixel_folder(tmp_path, diffusers.PNDMScheduler()), SCHEDULER, _class_name=..., set_alpha_to_one=...)
    model = load_model("diffusers", str(root))
    assert model.schedule.final_alpha_cumprod == float(model.schedule.alphas_cumprod[0]) and not model.clip_sample


@pytest.mark.parametrize(("name", "settings", "expected"), [
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, "solver_order=3, solver_type=heun"),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type=fixed_large"),
    ("PNDMScheduler", {"skip_prk_steps": True}, "skip_prk_steps=True"),
])
def test_what_belongs_to_a_solver_is_named_in_the_log(tmp_path, caplog, name, settings, expected):
    root = pixel_folder(tmp_path, getattr(diffusers, name)(**settings))
    load_model("diffusers", str(root))
    assert expected in caplog.text and SCHEDULER in caplog.text
    caplog.clear()
    load_model("diffusers", str(pixel_folder(root, getattr(diffusers, name)())))
    assert "settings of the solver" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample_size": None}, "sample_size=null: set it to the height and width"),
        ({"sample_size": "8"}, 'sample_size="8"'),
        ({"sample_size": 0}, "sample_size=0"), ({"sample_size": -8}, "sample_size=-8"), ({"sample_size": 8.5}, "=8.5"),
        ({"sample_size": [8]}, "sample_size=[8]"), ({"sample_size": [8, "8"]}, "sample_size=[8,"),
        ({"sample_size": 7}, "sample_size"), ({"sample_size": True}, "sample_size=true"),
        ({"in_channels": 4}, "in_channels=4"), ({"out_channels": 5}, "out_channels=5: in_channels=3"),
        ({"in_channels": "3"}, 'in_channels="3"'), ({"in_channels": None}, "in_channels=null"),
        ({"in_channels": 0, "out_channels": 0}, "in_channels=0"),
        ({"center_input_sample": "yes"}, "center_input_sample"),
        ({"norm_eps": "1e-5"}, "norm_eps"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
        ({"flip_sin_to_cos": "false"}, "flip_sin_to_cos"), ({"layers_per_block": None}, "layers_per_block=null"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels"),
        ({"block_out_channels": [8]}, "no UNet2DModel can be made"),
        ({"norm_num_groups": 3}, "no UNet2DModel can be made"), ({"act_fn": "unheard"}, "no UNet2DModel can be made"),
        ({"down_block_types": ["Unheard", "DownBlock2D"]}, "no UNet2DModel can be made"),
        ({"num_class_embeds": 0}, "num_class_embeds=0"), ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"time_embedding_type": "learned"}, "time_embedding_type"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name"),
        ({"_class_name": ["UNet2DModel"]}, "_class_name"),
    ],
)
def test_impossible_settings_of_a_network(pixel, weights_are_not_read, changes, expected):
    root = edit(pixel, "unet/config.json", **changes)
    text = message(root)
    assert f"{root}: unet/config.json: " in text and expected in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scaling_factor": None}, "scaling_factor=null"), ({"scaling_factor": "0.18"}, 'scaling_factor="0.18"'),
        ({"scaling_factor": 0}, "scaling_factor=0"), ({"scaling_factor": float("nan")}, "scaling_factor=NaN"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"), ({"latents_mean": [0.1, 0.2, 0.3]}, "latents_mean"),
        ({"latents_std": [1.0, 1.0, 1.0]}, "latents_std"), ({"latent_channels": 4}, "latent_channels=4"),
        ({"use_post_quant_conv": "no"}, "use_post_quant_conv"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "_class_name"),
        ({"_class_name": "VQModel"}, "model_index.json names AutoencoderKL as vqvae"),
        ({"block_out_channels": [4]}, "no AutoencoderKL can be made"), ({"norm_num_groups": 0}, "AutoencoderKL"),
    ],
)
def test_impossible_settings_of_an_autoencoder(latent, weights_are_not_read, changes, expected):
    root = edit(latent, "vqvae/config.json", **changes)
    text = message(root)
    assert f"{root}: vqvae/config.json: " in text and expected in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample_size": [8, 8]}, "sample_size=[8, 8]: a DiT takes one number"), ({"sample_size": 7}, "sample_size"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=null"),
        ({"num_embeds_ada_norm": 0}, "num_embeds_ada_norm=0"),
        ({"num_embeds_ada_norm": 1}, "id2label names 2 classes"), ({"out_channels": 4}, "out_channels=4"),
        ({"norm_type": "layer_norm"}, "no DiTTransformer2DModel can be made"),
        ({"patch_size": 0}, "DiTTransformer2DModel"),
        ({"in_channels": 4, "out_channels": 8}, "in_channels and sample_size of transformer/config.json"),
    ],
)
def test_impossible_settings_of_a_transformer(tmp_path, changes, expected):
    root = edit(dit_folder(tmp_path, num_embeds_ada_norm=10), INDEX, id2label={"0": "cat", "1": "dog"})
    assert expected in message(edit(root, "transformer/config.json", **changes))


def test_a_transformer_of_the_older_class(tmp_path):
    root = edit(dit_folder(tmp_path, num_embeds_ada_norm=10), INDEX, transformer=["diffusers", "Transformer2DModel"])
    edit(root, "transformer/config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    assert load_model("diffusers", str(root)).n_classes == 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unet": ["diffusers", "UNet1DModel"]}, "'UNet1DModel']: known are UNet2DModel"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "model_index.json names UNet2DConditionModel as unet"),
        ({"unet": [None, None]}, "unet=[None, None]"), ({"unet": "UNet2DModel"}, "unet=UNet2DModel"),
        ({"scheduler": ["diffusers", "PNDMScheduler"]}, "model_index.json names PNDMScheduler as scheduler"),
        ({"vqvae": ["diffusers", "AutoencoderOobleck"]}, "known are VQModel, AutoencoderKL"),
        ({"vqvae": [None, None]}, "names no first stage"), ({"vqvae": ...}, "names no first stage"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "names vqvae and vae"),
        ({"vqvae": ..., "vae": ["diffusers", "AutoencoderKL"]}, "there is no vae/config.json"),
        ({"_class_name": None}, "holds a None"), ({"_class_name": ["x", "LDMPipeline"]}, "known are UNet2DModel"),
    ],
)
def test_parts_that_the_index_does_not_name(latent, changes, expected):
    assert expected in message(edit(latent, INDEX, **changes))


@pytest.mark.parametrize("content", ["", "null", "[]", "3", "{", "\xff", "[" * 100_000])
@pytest.mark.parametrize("file", [INDEX, SCHEDULER, "unet/config.json"])
def test_files_that_are_no_settings(pixel, file, content):
    root = pixel
    (root / file).write_bytes(content.encode("latin-1"))
    assert (root / file).name in message(root)


@pytest.mark.parametrize("file", [SCHEDULER, "unet/config.json"])
def test_missing_files_of_a_pipeline(pixel, file):
    root = pixel
    (root / file).unlink()
    assert (root / file).name in message(root)


def test_settings_of_other_classes_have_no_effect(tmp_path):
    """Many PNDM folders hold a `clip_sample` that PNDM does not have."""
    root = pixel_folder(tmp_path, diffusers.PNDMScheduler(**BETAS))
    edit(root, SCHEDULER, clip_sample=True, thresholding=True)
    assert not load_model("diffusers", str(root)).clip_sample


def test_settings_are_read_as_utf8(tmp_path):
    root = dit_folder(tmp_path, num_embeds_ada_norm=10)
    path = root / INDEX
    path.write_bytes(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "ž"}}, ensure_ascii=False).encode())
    assert load_model("diffusers", str(root)).n_classes == 10


def test_a_short_schedule_is_sampled_in_as_many_steps(tmp_path):
    model = load_model("diffusers", str(pixel_folder(tmp_path, DDPMScheduler(num_train_timesteps=20, **BETAS))))
    assert len(model.time_grid()) == 20 and torch.isfinite(model.schedule.alphas_cumprod).all()
