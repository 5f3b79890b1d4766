"""Folders as `diffusers` saves them: the same outputs as its own modules, and clear words about the others."""

import json
import os

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import CheckpointError, ConfigError


def unet(**settings):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **settings,
    ).eval()


def autoencoder(cls, **settings):
    torch.manual_seed(1)
    blocks = {"block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
              "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4}
    return cls(latent_channels=3, sample_size=16, **blocks, **settings).eval()


def transformer():
    torch.manual_seed(2)
    network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
                                    num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def scheduler(**settings):
    return DDIMScheduler(**{"clip_sample": False, **settings})


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
T, Y = torch.tensor([999.0, 12.5]), torch.tensor([4, 10])


@pytest.fixture
def pixel(tmp_path):
    """A DDIM pipeline of a pixel model."""
    DDIMPipeline(unet(), scheduler(steps_offset=1, set_alpha_to_one=False)).save_pretrained(tmp_path)
    return tmp_path


def assert_same(found, expected):
    """Up to rounding: kernels depend on where in memory a weight starts."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_a_pipeline_of_a_pixel_model(pixel):
    model = load_model("diffusers", str(pixel))
    assert_same(model.denoiser(X, T), unet()(X, T).sample)
    assert (model.sample_shape, model.image_shape, model.clip_sample) == ((3, 8, 8), (3, 8, 8), False)
    reference = scheduler().alphas_cumprod.double()
    assert torch.equal(model.schedule.alphas_cumprod, reference)
    assert (model.schedule.steps_offset, model.schedule.final_alpha_cumprod) == (1, float(reference[0]))
    assert not model.denoiser.training and not any(p.requires_grad for p in model.denoiser.parameters())


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_a_bare_network(tmp_path, caplog, safe):
    unet(out_channels=6).save_pretrained(tmp_path, safe_serialization=safe)
    model = load_model("diffusers", str(tmp_path))
    assert_same(model.denoiser(X, T), unet(out_channels=6)(X, T).sample[:, :3])
    assert "no scheduler settings" in caplog.text and model.clip_sample


@torch.no_grad()
def test_components_may_lie_beside_the_index(tmp_path):
    """As in early repositories, with the scheduler of DDPM."""
    unet().save_pretrained(tmp_path)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = load_model("diffusers", str(tmp_path))
    assert_same(model.denoiser(X, T), unet()(X, T).sample)
    assert (model.clip_sample, model.schedule.steps_offset, model.schedule.final_alpha_cumprod) == (True, 0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("cls", [VQModel, AutoencoderKL])
def test_latent_diffusion(tmp_path, cls):
    settings = {"num_vq_embeddings": 16} if cls is VQModel else {}
    stage = autoencoder(cls, scaling_factor=0.5, **settings)
    LDMPipeline(stage, unet(), scheduler()).save_pretrained(tmp_path)
    model = load_model("diffusers", str(tmp_path))
    assert_same(model.denoiser(X, T), unet()(X, T).sample)
    assert_same(model.decode(X), stage.decode(X / 0.5).sample)
    images = torch.randn(1, 3, 16, 16)
    encoded = stage.encode(images)
    latents = encoded.latents if cls is VQModel else encoded.latent_dist.mode()
    assert_same(model.encode(images), latents * 0.5)
    assert (model.sample_shape, model.image_shape, model.null_label) == ((3, 8, 8), (3, 16, 16), None)


@torch.no_grad()
def test_dit(tmp_path):
    """Its noise estimate is the first half of the channels; label 10 of ten classes means no class."""
    DiTPipeline(transformer(), autoencoder(AutoencoderKL), scheduler()).save_pretrained(tmp_path)
    model = load_model("diffusers", str(tmp_path))
    expected = transformer()(X, timestep=T, class_labels=Y).sample[:, :3]
    assert_same(model.denoiser(X, T, Y), expected)
    assert_same(model.denoiser(X[1:], T[1:], None), model.denoiser(X[1:], T[1:], torch.tensor([10])))
    assert (model.n_classes, model.null_label, model.image_shape) == (10, 10, (3, 16, 16))
    names = [name for name, module in model.denoiser.named_modules() if isinstance(module, (torch.nn.Linear,))]
    assert model.first_layers == ("*pos_embed.proj",) and model.last_layers == ("*proj_out_2",)
    assert any(name.endswith("proj_out_2") for name in names)
    grid = model.time_grid(3)
    assert model.sample(model.guided(model.denoiser, 4.0), grid, range(2), 0).shape == (2, 3, 16, 16)


def test_the_denoiser_alone_has_the_chosen_type(tmp_path):
    LDMPipeline(autoencoder(VQModel, num_vq_embeddings=16), unet(), scheduler()).save_pretrained(tmp_path)
    model = load_model("diffusers", str(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.first_stage.parameters()} == {torch.float32}
    assert model.denoiser(X, T).dtype == torch.float32


def test_the_digest_follows_weights_and_scheduler(pixel):
    first = load_model("diffusers", str(pixel)).digest
    assert load_model("diffusers", str(pixel)).digest == first
    edit(pixel / "scheduler" / "scheduler_config.json", beta_end=0.03)
    assert load_model("diffusers", str(pixel)).digest != first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prediction_type": "flow_prediction"}, "only models with prediction_type=epsilon or v_prediction or sample"),
        ({"thresholding": True}, "thresholding=True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ({"beta_schedule": "unheard"}, "unknown beta_schedule=unheard"),
    ],
)
def test_schedulers_that_are_not_implemented(pixel, changes, expected):
    edit(pixel / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ConfigError, match=expected):
        load_model("diffusers", str(pixel))


def test_a_scheduler_without_betas(pixel):
    (pixel / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "ScoreSdeVeScheduler", "snr": 0.1}')
    with pytest.raises(ConfigError, match="ScoreSdeVeScheduler.* has no betas"):
        load_model("diffusers", str(pixel))


def message(checkpoint):
    with pytest.raises(CheckpointError) as caught:
        load_model("diffusers", str(checkpoint))
    assert str(caught.value).startswith("model.checkpoint=") and "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_of_other_kinds(tmp_path, pixel):
    edit(pixel / "model_index.json", _class_name="StableDiffusionPipeline")
    known = "known are UNet2DModel, UNet2DConditionModel, DDPMPipeline"
    assert f"holds a StableDiffusionPipeline; {known}" in message(pixel)
    UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), sample_size=8,
                         up_block_types=("UpBlock2D",)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="set model.conditions to an .npz file that holds encoder_hidden_states"):
        load_model("diffusers", str(tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    assert "not a diffusers folder: no config.json" in message(tmp_path / "empty")


def test_networks_of_other_kinds(tmp_path):
    unet(time_embedding_type="fourier").save_pretrained(tmp_path / "fourier")
    assert "fourier time embeddings" in message(tmp_path / "fourier")


def test_damaged_folders(pixel):
    weights = pixel / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert "not a complete UNet2DModel" in message(pixel)
    weights.unlink()
    assert "not a complete UNet2DModel" in message(pixel)
    weights.write_bytes(content)
    (pixel / "model_index.json").write_text("{")
    assert "not readable JSON" in message(pixel)


def test_leftover_and_missing_weights_are_errors(pixel):
    path = pixel / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "strange": torch.zeros(1)}, path, {"format": "pt"})
    assert "1 unexpected (strange)" in message(pixel)
    save_file({key: value for key, value in state.items() if key != "conv_in.bias"}, path, {"format": "pt"})
    assert "1 missing (conv_in.bias)" in message(pixel)
    save_file({**state, "conv_in.bias": torch.zeros(9)}, path, {"format": "pt"})
    assert "size mismatch for conv_in.bias" in message(pixel)


def test_code_in_pickled_weights_is_not_executed(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    unet().save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"conv_in.weight": Runs()}, tmp_path / "diffusion_pytorch_model.bin")
    assert "not a complete UNet2DModel" in message(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_what_is_neither_a_folder_nor_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such folder, and not a repository id" in message(tmp_path / "nothing")
    assert "neither in the local cache nor reachable" in message("nobody/no-such-model")
    (tmp_path / "file").write_text("")
    assert "a file; the model `diffusers` takes a folder" in message(tmp_path / "file")
    with pytest.raises(ConfigError, match="model.checkpoint=null: the model diffusers needs a folder"):
        load_model("diffusers")


@pytest.mark.parametrize("safe", [True, False])
def test_a_repository_is_fetched_without_code(tmp_path, monkeypatch, safe):
    """Settings and safetensors first; pickled tensors only where there are no others."""
    unet().save_pretrained(tmp_path, safe_serialization=safe)
    calls = []

    def snapshot_download(repository, allow_patterns, ignore_patterns):
        calls.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("diffusers", "owner/name").sample_shape == (3, 8, 8)
    assert len(calls) == (1 if safe else 2)
    assert not any(pattern.endswith((".py", "*")) for pattern in calls[-1] if "safetensors" not in pattern)
    assert safe or any(pattern.endswith(".bin") for pattern in calls[-1])
