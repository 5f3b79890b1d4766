"""DDPM on CIFAR-10 (Ho et al. 2020) in the PyTorch port that DDIM and Q-Diffusion use."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import UNet2DModel
from torch import nn

from ptq_exp.diffusion.checkpoints import Part, ermongroup, fill, identity, read_checkpoint
from ptq_exp.diffusion.denoisers import UNetDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.diffusion.zoo.build import empty_or_random, frozen, linear_alphas_cumprod, random_digest, torch_dtype
from ptq_exp.diffusion.zoo.components import component_digest, load_component
from ptq_exp.storage.atomic import file_digest

_CHANNELS = (128, 256, 256, 256)
_WANTED = "the PyTorch port of the DDPM CIFAR-10 network (ema-cifar10-model-790000.ckpt), or its diffusers folder"


def ddpm_cifar10(
    checkpoint: str | None = None, *, name: str = "ddpm_cifar10", dtype: str = "float32"
) -> DiffusionModel:
    """CIFAR-10, 35.7 M parameters, states [3, 32, 32]; sampled by DDIM, 100 steps, quad spacing, no clipping.

    Args:
        checkpoint: a file in the layout of ermongroup's `ddim` (of a training list the averaged weights are taken), or
            a diffusers folder of the same network; None = random weights (warned about).
        name: what tables call it.
        dtype: of the denoiser: float32, bfloat16, float16 or float64.

    Raises:
        CheckpointError: the file cannot be read safely or is of another network.
        ConfigError: an unknown dtype.
    """
    number_type = torch_dtype(dtype)
    with empty_or_random(name, checkpoint):
        unet = _unet()
    return DiffusionModel(
        name=name,
        digest=random_digest(name) if checkpoint is None else _load(unet, checkpoint),
        denoiser=frozen(UNetDenoiser(unet), number_type, checkpoint),
        schedule=NoiseSchedule(linear_alphas_cumprod(), steps_offset=0),
        sample_shape=(3, 32, 32),
        clip_sample=False,
        sampler=SamplerDefaults(100, "quad", 0.0),
    )


def _unet() -> UNet2DModel:
    """One attention head, sine before cosine, downsampling padded on the right and at the bottom."""
    return UNet2DModel(
        sample_size=32, block_out_channels=_CHANNELS, layers_per_block=2, norm_eps=1e-6, norm_num_groups=32,
        flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, attention_head_dim=None, dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def _load(unet: nn.Module, checkpoint: str) -> str:
    """Fill `unet` from a file or a folder; returns the digest."""
    path = Path(checkpoint)
    if not path.is_dir():
        rename = partial(ermongroup.unet, levels=len(_CHANNELS))
        fill([Part(unet, rename)], read_checkpoint(path), path, wanted=_WANTED)
        return file_digest(path)
    component = "unet" if (path / "unet").is_dir() else ""
    fill([Part(unet, identity)], load_component(UNet2DModel, path, component).state_dict(), path, wanted=_WANTED)
    return component_digest(path, [component])
