"""The embedded diffusion transformer: its structure, its weights, and samples of the class that was asked for."""

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from safetensors.torch import load_file

import ptq_exp
from ptq_exp.embedded import DigitsExtractor, card, digits_dit_model, digits_ldm_model
from ptq_exp.embedded.networks import build_dit
from ptq_exp.embedded.weights_file import WEIGHTS
from ptq_exp.errors import CheckpointError
from ptq_exp.quantization import Policy, Widths, quantize_


@pytest.fixture(scope="module")
def model():
    return digits_dit_model()


def test_it_is_a_dit_on_the_latents_of_the_other_model(model):
    transformer, other = model.denoiser.transformer, digits_ldm_model()
    norms = [module for module in transformer.modules() if isinstance(module, AdaLayerNormZero)]
    assert len(norms) == 4 and transformer.config.num_embeds_ada_norm == 10
    assert (model.sample_shape, model.image_shape) == (other.sample_shape, other.image_shape)
    assert (model.n_classes, model.null_label) == (10, 10) and model.digest != other.digest
    assert torch.equal(model.schedule.alphas_cumprod, other.schedule.alphas_cumprod)
    assert sum(p.numel() for p in model.denoiser.parameters()) == card("digits_dit")["parameters"]
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.denoiser.parameters())
    assert {value.dtype for value in load_file(WEIGHTS / "digits_dit.safetensors").values()} == {torch.float16}


def test_a_new_one_estimates_nothing_and_drops_no_labels_itself():
    torch.manual_seed(0)
    network, x, t = build_dit().train(), torch.randn(3, 3, 8, 8), torch.full((3,), 500.0)
    assert not network(x, t, torch.tensor([0, 5, 9])).any()
    embedder = network.transformer.transformer_blocks[0].norm1.emb.class_embedder
    labels = torch.arange(10).repeat(100)
    assert torch.equal(embedder(labels), embedder.embedding_table(labels))


def test_guided_samples_are_of_their_class(model):
    images, labels = ptq_exp.sample(model, 40, 1, steps=10, batch_size=40), model.labels(range(40), 1)
    assert images.shape == (40, 32, 32, 1) and labels.bincount().tolist() == [4] * 10
    read = torch.from_numpy(DigitsExtractor()(images)[2]).argmax(1)
    assert int((read == labels).sum()) >= 36
    facts = card("digits_dit")
    assert facts["label_agreement"] > 0.95 and facts["inception_score"] > 9.8


def test_without_a_label_it_draws_what_the_null_label_says(model):
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400.0, 400.0])
    null = model.denoiser(x, t, torch.tensor([10, 10]))
    assert torch.equal(model.denoiser(x, t), null)
    assert not torch.equal(model.denoiser(x, t, torch.tensor([3, 3])), null)


def test_the_policy_knows_its_first_and_last_layer(model):
    network = model.copy_denoiser()
    rules = Policy(first=model.first_layers, last=model.last_layers).rules(Widths(4, 4, first_last=8, boundary=16))
    rows = {row.name: row for row in quantize_(network, rules, model.example_inputs()).rows}
    first, last, inner = (rows[f"transformer.{name}"] for name in (
        "pos_embed.proj", "proj_out_2", "transformer_blocks.1.attn1.to_q"))
    assert (first.weight_bits, first.activation_bits, last.weight_bits) == (8, 16, 8)
    assert (inner.weight_bits, inner.activation_bits) == (4, 4)


def test_weights_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="weights of another network"):
        digits_dit_model(checkpoint=str(WEIGHTS / "digits_unet.safetensors"))
