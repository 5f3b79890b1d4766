"""The embedded pipelines before training: words, tokens, and networks that a diffusers pipeline calls as trained."""

import pytest
import torch
from diffusers import AutoencoderKL

from ptq_exp.embedded.pipeline_networks import (
    MAX_TOKENS,
    build_kl_autoencoder,
    build_t5_tokenizer,
    build_tokenizer,
)
from ptq_exp.embedded.pipelines import NETWORKS, save_pipeline
from ptq_exp.embedded.prompts import evaluation_prompts, training_words

PROMPTS = ["a thick left-slanted seven", "a two", ""]


def test_every_word_is_one_token_and_every_prompt_fits():
    clip, t5 = build_tokenizer(), build_t5_tokenizer()
    for word in training_words():
        assert clip.tokenize(word) == [f"{word}</w>"]
        assert t5.tokenize(word) == [f"\u2581{word}"]
    for tokenizer in (clip, t5):
        ids = [tokenizer(text).input_ids for text in evaluation_prompts(90)]
        assert len({tuple(row) for row in ids}) == 90 and max(map(len, ids)) <= MAX_TOKENS
        # no word of a prompt is unknown to the tokenizer
        unknown = tokenizer.unk_token_id
        assert all(unknown not in row[1:-1] for row in ids)


def test_other_words_fall_into_letters():
    clip = build_tokenizer()
    assert clip.tokenize("fox") == ["fo", "x</w>"]
    assert clip.decode(clip("a red fox").input_ids, skip_special_tokens=True) == "a red fox"
    assert build_tokenizer()("A THICK Seven").input_ids == build_tokenizer()("a thick seven").input_ids


@pytest.fixture(params=list(NETWORKS))
def network(request):
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    for parameter in network.parameters():  # the transformer's last layers start at zero
        torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


@torch.no_grad()
def pipeline_prediction(pipe, x, t, **arguments):
    """What the pipeline's network gives for the prompts, through the pipeline's own encoding of them."""
    if hasattr(pipe, "unet"):
        tokens, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
        return pipe.unet(x, t, tokens).sample
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, **arguments)
    return pipe.transformer(x, tokens, pooled, t).sample


def test_the_trained_network_is_what_the_pipeline_calls(network):
    pipe = network.pipeline(build_kl_autoencoder())
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 999.0])
    ids = network.tokenize(PROMPTS)
    for length in (MAX_TOKENS, 40) if hasattr(network, "transformer") else (None,):
        arguments = {} if length is None else {"max_sequence_length": length}
        with torch.no_grad():
            ours = network(x, t, ids) if length is None else network(x, t, ids, length)
        theirs = pipeline_prediction(pipe, x, t, **arguments)
        assert torch.equal(ours, theirs) and float(ours.std()) > 1e-3


def test_a_saved_pipeline_is_half_as_large_and_loads_as_float32(network, tmp_path):
    pipe = network.pipeline(build_kl_autoencoder())
    reference = {name: p.detach().clone() for name, p in network.named_parameters()}
    save_pipeline(pipe, tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    for name, component in again.components.items():
        if isinstance(component, torch.nn.Module):
            assert {p.dtype for p in component.parameters()} == {torch.float32}, name
    assert isinstance(again.vae, AutoencoderKL)
    for name, value in reference.items():
        part, _, key = name.partition(".")
        loaded = dict(getattr(again, part).named_parameters())[key]
        assert torch.equal(loaded, value if part.startswith("text_encoder") else value.half().float())
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if hasattr(again, name):
            text = PROMPTS[0]
            assert getattr(again, name)(text).input_ids == getattr(pipe, name)(text).input_ids
