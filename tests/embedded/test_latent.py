"""The embedded latent model: its data, its autoencoder, and samples of the class that was asked for."""

import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ptq_exp
from ptq_exp.embedded import DigitsExtractor, card, digits, digits_ldm_model, digits_reference
from ptq_exp.embedded.networks import DigitsClassifier
from ptq_exp.embedded.training.latent_modules import codes_used, encode_all, reconstruction_psnr
from ptq_exp.embedded.weights_file import WEIGHTS, load_weights
from ptq_exp.errors import CheckpointError, ConfigError, DataError
from ptq_exp.evaluation.images import from_uint8, to_uint8


@pytest.fixture(scope="module")
def model():
    return digits_ldm_model()


@pytest.fixture(scope="module")
def autoencoder(model):
    return model.first_stage.autoencoder


def test_larger_digits_are_the_same_scans():
    small, large = digits("held_out"), digits("held_out", 32)
    assert large.images.shape == (len(small.images), 1, 32, 32) and torch.equal(small.labels, large.labels)
    assert float(large.images.min()) == -1 and float(large.images.max()) == 1
    averaged = F.interpolate(large.images, size=16, mode="area")
    assert float((averaged - small.images).square().mean()) < 0.002
    assert digits_reference(32).shape == (1797, 32, 32, 1)


def test_the_classifier_reads_averaged_digits_as_well_as_small_ones():
    classifier, labels = DigitsClassifier(), digits("held_out").labels
    load_weights(classifier, WEIGHTS / "digits_classifier.safetensors")
    averaged = F.interpolate(digits("held_out", 32).images, size=16, mode="area")
    with torch.no_grad():
        wrong = [int((classifier(x).logits.argmax(1) != labels).sum()) for x in (digits("held_out").images, averaged)]
    assert abs(wrong[0] - wrong[1]) <= 1 and wrong[1] <= 3


def test_the_extractor_averages_large_digits_and_refuses_other_sizes():
    extractor, images = DigitsExtractor(), digits_reference()[:4]
    doubled = images.repeat(2, axis=1).repeat(2, axis=2)
    for small, large in zip(extractor(images), extractor(doubled), strict=True):
        np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-5)
    for shape in [(4, 64, 64, 1), (4, 16, 16, 3)]:
        with pytest.raises(DataError, match="evaluation=digits scores digits of 16x16x1 or 32x32x1"):
            extractor(np.zeros(shape, np.uint8))


def test_held_out_digits_pass_the_autoencoder(model, autoencoder):
    images = digits("held_out", 32).images
    assert reconstruction_psnr(autoencoder, images) == pytest.approx(card("digits_vq")["held_out_psnr_db"], abs=0.05)
    assert reconstruction_psnr(autoencoder, images) > 35
    assert codes_used(autoencoder, images) > 150
    z = model.encode(images)
    assert z.shape[1:] == model.sample_shape and float(z.std()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(z, encode_all(autoencoder, images) * model.first_stage.scaling_factor)
    # decoding picks codes: a latent beside a code gives the image of that code
    assert torch.equal(model.decode(z[:2]), model.decode(z[:2] + 1e-6))


def test_scaled_latents_have_unit_deviation(model, autoencoder):
    factor = model.first_stage.scaling_factor
    assert factor == autoencoder.config.scaling_factor == card("digits_vq")["scaling_factor"]
    assert float(model.encode(digits("train", 32).images).std()) == pytest.approx(1, abs=1e-3)


def test_the_autoencoder_is_a_small_vq_f4(autoencoder):
    assert len(autoencoder.encoder.down_blocks) == len(autoencoder.decoder.up_blocks) == 3
    assert autoencoder.quantize.embedding.weight.shape == (256, 3)
    for part in (autoencoder.encoder, autoencoder.decoder):
        assert sum(isinstance(m, Attention) for m in part.mid_block.modules()) == 1


def test_the_unet_has_every_kind_of_layer_of_ldm4(model):
    unet, embedding = model.denoiser.unet, model.denoiser.class_embedding
    transformers = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    assert len(transformers) >= 4 and embedding.num_embeddings == 11
    for block in transformers:
        assert isinstance(block.ff.net[0], GEGLU) and block.attn1.heads == 2
        assert block.attn2.to_k.in_features == embedding.embedding_dim  # reads the class
    up = [m for m in unet.up_blocks.modules() if isinstance(m, ResnetBlock2D)]
    assert len(up) == 4 and all(m.conv_shortcut.kernel_size == (1, 1) for m in up)


def test_parameters_are_as_many_as_the_cards_say(model, autoencoder):
    for name, network in (("digits_latent_unet", model.denoiser), ("digits_vq", autoencoder)):
        assert sum(p.numel() for p in network.parameters()) == card(name)["parameters"]


def test_the_model_is_ready_to_be_sampled(model):
    modules = [m for part in (model.denoiser, model.first_stage) for m in part.modules()]
    assert not any(m.training for m in modules)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert model.sample_shape == (3, 8, 8) and model.image_shape == (1, 32, 32) and not model.clip_sample
    assert (model.n_classes, model.null_label) == (10, 10)
    # latent diffusion's schedule: betas from 0.0015 to 0.0195, the last step ends at the first level
    levels = model.schedule.alphas_cumprod
    assert len(levels) == 1000 and float(1 - levels[0]) == pytest.approx(0.0015)
    assert float(1 - levels[-1] / levels[-2]) == pytest.approx(0.0195)
    assert model.schedule.steps_offset == 1 and model.schedule.final_alpha_cumprod == float(levels[0])


def test_guidance_and_sampler_written_out_give_the_digits_that_were_asked_for(model):
    """Twenty DDIM steps at eta 0, and guidance of 1.5; chance would be 10 %."""
    labels = torch.arange(10).repeat(4)
    z = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = model.schedule.alphas_cumprod.float()
    for t in range(951, 0, -50):
        time = torch.full((40,), float(t))
        uncond, cond = model.denoiser(z, time, None), model.denoiser(z, time, labels)
        eps = uncond + 1.5 * (cond - uncond)
        level, after = levels[t], levels[max(t - 50, 0)]
        z = after.sqrt() * (z - (1 - level).sqrt() * eps) / level.sqrt() + (1 - after).sqrt() * eps
    read = torch.from_numpy(DigitsExtractor()(to_uint8(model.decode(z)))[2]).argmax(1)
    assert int((read == labels).sum()) >= 38
    facts = card("digits_latent_unet")
    assert facts["label_agreement"] > 0.95 and facts["inception_score"] > 9.9


def test_the_digest_covers_unet_and_autoencoder(model, tmp_path):
    tensors = load_file(WEIGHTS / "digits_latent_unet.safetensors")
    path = tmp_path / "mine.safetensors"
    save_file(tensors | {"class_embedding.weight": tensors["class_embedding.weight"] + 1}, path)
    other = digits_ldm_model(name="mine", checkpoint=str(path))
    assert other.name == "mine" and len(other.digest) == 64 and other.digest != model.digest
    # the card's hash is that of the U-Net's file alone
    assert model.digest not in {card(name)["sha256"] for name in ("digits_vq", "digits_latent_unet")}


def test_guided_samples_are_of_their_class(model):
    images, labels = ptq_exp.sample(model, 40, 1, steps=10, batch_size=40), model.labels(range(40), 1)
    assert images.shape == (40, 32, 32, 1) and labels.bincount().tolist() == [4] * 10
    read = torch.from_numpy(DigitsExtractor()(images)[2]).argmax(1)
    assert int((read == labels).sum()) >= 36
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


def test_a_label_out_of_ten_is_what_the_null_label_means(model):
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400.0, 400.0])
    null = model.denoiser(x, t, torch.tensor([10, 10]))
    assert torch.equal(model.denoiser(x, t), null)
    assert not torch.equal(model.denoiser(x, t, torch.tensor([3, 3])), null)


def test_all_weights_of_the_package_are_under_20_mb():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 20e6


def test_wrong_files_and_types_are_one_clear_line():
    with pytest.raises(CheckpointError, match="weights of another network"):
        digits_ldm_model(checkpoint=str(WEIGHTS / "digits_unet.safetensors"))
    with pytest.raises(ConfigError, match="model.dtype=int8: choose one of float32"):
        digits_ldm_model(dtype="int8")


def test_dtype_is_that_of_the_denoiser_alone():
    half = digits_ldm_model(dtype="bfloat16")
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.first_stage.parameters()} == {torch.float32}
    eps = half.example_inputs().evaluate(half.denoiser)
    assert eps.dtype == torch.float32 and torch.isfinite(eps).all()
    assert from_uint8(ptq_exp.sample(half, 2, steps=2, batch_size=2)).shape == (2, 1, 32, 32)
