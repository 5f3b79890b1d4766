"""The networks of the embedded pipelines, with random weights, as `diffusers` and `transformers` have them.

`digits_text` is a small Stable Diffusion 2.1 (cross-attention U-Net, v-prediction), `digits_flow` a small Stable
Diffusion 3.5 (joint-attention transformer, rectified flow). Both draw in the latents of one autoencoder.
"""

from __future__ import annotations

import string

from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE
from ptq_exp.embedded.prompts import training_words

LATENT_CHANNELS = 4
LATENT_SIZE = LATENT_IMAGE_SIZE // 4
MAX_TOKENS = 12
T5_MAX_TOKENS = 256
TEXT_WIDTH = 64
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Make CLIP's byte-pair encoding for the prompts' words: each is one token, other text falls into letters.

    Returns:
        Token -> id (bytes, bytes that end a word, merged pieces, begin and end of text) and the merges in order.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in training_words():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(pieces)):
            merge = "".join(pieces[:i]), pieces[i]
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    return {token: i for i, token in enumerate([*dict.fromkeys(tokens), BEGIN, END])}, merges


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer: at most 12 tokens with begin and end of text."""
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build a CLIP text encoder of width 64 with 2 layers; with `projection` it also gives one vector per prompt."""
    vocab, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab[BEGIN], eos_token_id=vocab[END], pad_token_id=vocab[END],
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_vocabulary() -> list[tuple[str, float]]:
    """Make T5's unigram vocabulary for the prompts' words: (piece, log probability), special tokens first."""
    words = [f"\u2581{word}" for word in training_words()]
    characters = ["\u2581", "-", *string.ascii_letters, *string.digits, *(w[1:] for w in words if len(w) > 2)]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words),
            *((text, -4.0 if len(text) > 1 else -8.0) for text in dict.fromkeys(characters))]


def build_t5_tokenizer() -> T5Tokenizer:
    """Build the tokenizer of the T5 encoder; its length is an argument of the pipeline's call."""
    return T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0, model_max_length=T5_MAX_TOKENS)


def build_t5_encoder() -> T5EncoderModel:
    """Build a T5 encoder of one layer, as wide as both CLIP encoders side by side."""
    return T5EncoderModel(T5Config(
        vocab_size=len(t5_vocabulary()), d_model=2 * TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=1,
        num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    ))


def build_kl_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 32x32x1 images -> 8x8x4 latents, three levels, attention in the middle, 0.4 M."""
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=LATENT_CHANNELS, sample_size=LATENT_IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0, shift_factor=0.0,
    )


def build_text_unet() -> UNet2DConditionModel:
    """Build the U-Net of `digits_text`: two levels, each with transformer blocks that attend to the prompt, 2.4 M."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96), layers_per_block=1, cross_attention_dim=TEXT_WIDTH, attention_head_dim=2,
        norm_num_groups=8, use_linear_projection=True,
    )


def build_flow_transformer() -> SD3Transformer2DModel:
    """Build the transformer of `digits_flow`: width 128, 6 joint blocks with RMS-normed queries and keys, 3.5 M."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=6, attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128,
        joint_attention_dim=2 * TEXT_WIDTH, pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
