"""Folders of `diffusers` with small networks of random weights, each made in a fraction of a second."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)


def unet(**settings) -> UNet2DModel:
    torch.manual_seed(17)
    return UNet2DModel(
        **dict(
            sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ) | settings
    )  # fmt: skip


def autoencoder(cls=VQModel, **settings):
    torch.manual_seed(1)
    return cls(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, **{"latent_channels": 3} | settings,
    )  # fmt: skip


def pixel(folder: Path, network: UNet2DModel | None = None, **settings) -> str:
    """A DDPM pipeline; `settings` of its scheduler. Returns its path."""
    scheduler = DDIMScheduler(**{"clip_sample": False} | settings)
    DDPMPipeline(unet() if network is None else network, scheduler).save_pretrained(folder)
    return str(folder)


def latent(folder: Path, first_stage: VQModel | None = None) -> str:
    """A pipeline of latent diffusion."""
    scheduler = DDIMScheduler(clip_sample=False)
    LDMPipeline(first_stage or autoencoder(), unet(), scheduler).save_pretrained(folder)
    return str(folder)


def dit(folder: Path) -> str:
    """A class-conditional transformer of ten classes with its autoencoder."""
    torch.manual_seed(2)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    vae = autoencoder(AutoencoderKL, latent_channels=4)
    labels = {i: str(i) for i in range(10)}
    DiTPipeline(network, vae, DDIMScheduler(clip_sample=False), id2label=labels).save_pretrained(folder)
    return str(folder)
