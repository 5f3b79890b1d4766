"""The shipped networks: their cards, quality and structure, and what a wrong file says."""

import hashlib

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file

from ptq_exp.embedded import DigitsExtractor, card, digits, digits_model, digits_reference
from ptq_exp.embedded.load import WEIGHTS
from ptq_exp.errors import CheckpointError
from ptq_exp.evaluation import inception_score
from ptq_exp.evaluation.features import extract_features
from ptq_exp.evaluation.images import to_uint8

UNET = WEIGHTS / "digits_unet.safetensors"


@pytest.fixture(scope="module")
def model():
    return digits_model()


@pytest.fixture(scope="module")
def extractor():
    return DigitsExtractor()


@pytest.mark.parametrize("name", ["digits_unet", "digits_classifier", "digits_vq", "digits_latent_unet"])
def test_the_card_describes_the_shipped_weights(name):
    facts = card(name)
    weights = WEIGHTS / f"{name}.safetensors"
    assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for key in ("network", "data", "command", "optimizer"):
        assert facts[key]
    assert f"--steps {facts['steps']} --seed {facts['seed']}" in facts["command"]
    losses = facts["loss_by_tenth"]
    assert len(losses) == 10 and losses[-1] < losses[1] < losses[0]


def test_parameters_are_as_many_as_the_cards_say(model, extractor):
    for name, network in (("digits_unet", model.denoiser), ("digits_classifier", extractor.network)):
        assert sum(p.numel() for p in network.parameters()) == card(name)["parameters"]
    assert 1e6 <= card("digits_unet")["parameters"] <= 2e6


def test_the_unet_has_every_kind_of_layer(model):
    unet = model.denoiser.unet
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
    sizes = {}

    def record(module, args, output):
        sizes[module] = tuple(output.shape[-2:])

    hooks = [block.register_forward_hook(record) for block in blocks.values()]
    model.example_inputs().evaluate(unet)
    for hook in hooks:
        hook.remove()
    down = [sizes[m] for name, m in blocks.items() if name.startswith("down_blocks")]
    assert down == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 2
    up = [m for name, m in blocks.items() if name.startswith("up_blocks")]
    # every decoder block takes a concatenation and so has a 1x1 shortcut
    assert len(up) == 9 and all(m.conv_shortcut.kernel_size == (1, 1) for m in up)
    assert all(m.time_embedding_norm == "scale_shift" for m in up)
    assert sum(isinstance(m, Attention) for m in unet.modules()) >= 5


def test_the_model_is_ready_to_be_sampled(model):
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert len(model.schedule.alphas_cumprod) == 1000 and model.schedule.alphas_cumprod.dtype == torch.float64
    assert (model.schedule.alphas_cumprod.diff() < 0).all() and float(model.schedule.alphas_cumprod[-1]) < 1e-4
    assert model.digest == card("digits_unet")["sha256"] and model.name == "digits"


def test_the_denoiser_explains_the_noise_of_real_digits(model):
    """Its error on noised digits is what the training reached, far below that of the answer 0 (1.0)."""
    images = digits().images[:64]
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(5, 995, 64).long()
    eps = torch.randn(images.shape, generator=generator)
    level = model.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    found = model.denoiser(level.sqrt() * images + (1 - level).sqrt() * eps, t.float())
    assert float((found - eps).square().mean()) < 0.08


def test_the_classifier_knows_held_out_digits(extractor):
    images, labels = digits("held_out")
    _, _, logits = extractor(to_uint8(images))
    accuracy = float((logits.argmax(1) == labels.numpy()).mean())
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(card("digits_classifier")["held_out_accuracy"], abs=0.006)


def test_features_have_the_shapes_that_the_metrics_need(extractor):
    images = digits_reference()
    assert images.shape == (1797, 16, 16, 1) and images.dtype == np.uint8
    pooled, spatial, logits = extractor(images[:3])
    assert pooled.shape == (3, 64) and spatial.shape == (3, 64, 4, 4) and logits.shape == (3, 10)
    assert pooled.dtype == spatial.dtype == logits.dtype == np.float32
    assert extractor.name == f"digits-{card('digits_classifier')['sha256'][:8]}"
    statistics = extract_features(extractor, images[:50], batch_size=16)
    assert statistics.spatial.shape == (50, 7 * 16)
    np.testing.assert_allclose(statistics.spatial[:3], spatial[:, :7].reshape(3, -1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics.pooled[:3], pooled, rtol=0, atol=1e-5)


def test_real_digits_score_near_the_best_inception_score(extractor):
    """Ten classes, equally often and each recognised with certainty, would score 10."""
    assert 9.5 < inception_score(extract_features(extractor, digits_reference()).probabilities) < 10


def test_a_file_outside_the_package_loads_the_same(model, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(UNET.read_bytes())
    other = digits_model(name="mine", checkpoint=str(path))
    assert other.digest == model.digest and other.name == "mine"
    for ours, theirs in zip(model.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_missing_file_names_itself_and_the_setting(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.checkpoint=.*none\.safetensors: no such file"):
        digits_model(checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.checkpoint=.*: not a readable file"):
        digits_model(checkpoint=str(tmp_path))


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "pickle"])
def test_a_damaged_file_is_no_checkpoint(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    if damage == "pickle":
        torch.save({"conv_in.weight": torch.zeros(1)}, path)
    else:
        whole = UNET.read_bytes()
        path.write_bytes({"empty": b"", "truncated": whole[:-1], "text": b"no weights at all " * 9}[damage])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a complete safetensors file"):
        digits_model(checkpoint=str(path))


def test_weights_of_another_network_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="weights of another network .*Missing key.*conv_in"):
        digits_model(checkpoint=str(WEIGHTS / "digits_classifier.safetensors"))
    tensors = load_file(UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :, :1].contiguous()
    save_file(tensors, tmp_path / "shape.safetensors")
    with pytest.raises(CheckpointError, match=r"another network .*size mismatch for conv_in\.weight"):
        digits_model(checkpoint=str(tmp_path / "shape.safetensors"))
    tensors = load_file(UNET) | {"extra": torch.zeros(1)}
    save_file(tensors, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointError, match="another network .*Unexpected key.*extra"):
        digits_model(checkpoint=str(tmp_path / "extra.safetensors"))
