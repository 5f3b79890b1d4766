"""The embedded pipelines as they are trained and put together: plain `diffusers` folders, loadable without ptq_exp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ptq_exp.embedded.pipeline_networks import (
    MAX_TOKENS,
    build_flow_transformer,
    build_t5_encoder,
    build_t5_tokenizer,
    build_text_encoder,
    build_text_unet,
    build_tokenizer,
    vocabulary,
)

CALLS = {
    "digits_text": {"num_inference_steps": 20, "guidance_scale": 2.0},
    "digits_flow": {"num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": MAX_TOKENS},
}
"""Arguments of the documented call of each pipeline."""


class PromptedUNet(nn.Module):
    """Text encoder and U-Net of `digits_text` as one network of (x_t, t, token ids)."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.unet = build_text_unet()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Estimate v [N, C, H, W] as `StableDiffusionPipeline` calls the two."""
        return self.unet(x, t, self.text_encoder(ids)[0]).sample

    @staticmethod
    def tokenize(texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, 12] that `forward` takes."""
        return _padded_ids(build_tokenizer(), texts)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """Put the pipeline together."""
        return StableDiffusionPipeline(
            vae=vae, text_encoder=self.text_encoder, tokenizer=build_tokenizer(), unet=self.unet,
            scheduler=velocity_scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )


class PromptedTransformer(nn.Module):
    """Text encoders and transformer of `digits_flow` as one network of (x, t, token ids, length of T5's prompt)."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(projection=True)
        self.text_encoder_2 = build_text_encoder(projection=True)
        self.text_encoder_3 = build_t5_encoder()
        self.transformer = build_flow_transformer()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, length: int = MAX_TOKENS) -> Tensor:
        """Estimate the velocity [N, C, H, W] as `StableDiffusion3Pipeline(max_sequence_length=length)` does."""
        clip_ids, t5_ids = ids.split(MAX_TOKENS, dim=1)
        texts = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        pooled = torch.cat([text.text_embeds for text in texts], dim=-1)
        t5_tokens = self.text_encoder_3(F.pad(t5_ids, (0, length - MAX_TOKENS)))[0]
        return self.transformer(x, torch.cat([tokens, t5_tokens], dim=1), pooled, t).sample

    @staticmethod
    def tokenize(texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, 24] that `forward` takes: 12 of CLIP and 12 of T5."""
        tokenizers = build_tokenizer(), build_t5_tokenizer()
        return torch.cat([_padded_ids(tokenizer, texts) for tokenizer in tokenizers], dim=1)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        """Put the pipeline together."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
            text_encoder=self.text_encoder, tokenizer=build_tokenizer(),
            text_encoder_2=self.text_encoder_2, tokenizer_2=build_tokenizer(),
            text_encoder_3=self.text_encoder_3, tokenizer_3=build_t5_tokenizer(),
        )


def _padded_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    arguments = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **arguments).input_ids


NETWORKS = {"digits_text": PromptedUNet, "digits_flow": PromptedTransformer}


def velocity_scheduler() -> DDIMScheduler:
    """Build the scheduler of `digits_text`: Stable Diffusion's betas with zero terminal SNR, v-prediction, trailing.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed".
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a complete `diffusers` folder: weights in float16, those of the text encoders, which are small, in float32.

    `transformers` loads weights in the number format of the file, `diffusers` in float32: so both come out as float32.
    The CLIP tokenizers' `vocab.json` and `merges.txt` are written for versions of `transformers` before 5.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and not name.startswith("text_encoder"):
            component.half()
    pipeline.save_pretrained(folder)
    for name, component in pipeline.components.items():
        if isinstance(component, CLIPTokenizer):
            _write_vocabulary(folder / name)
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """Let everybody read the weights in `folder`: they are written for their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _write_vocabulary(folder: Path) -> None:
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
