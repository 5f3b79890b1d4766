"""Improved-diffusion (Nichol and Dhariwal 2021): unconditional CIFAR-10 and ImageNet 64x64, L_hybrid, cosine."""

from __future__ import annotations

from functools import partial

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ptq_exp.diffusion.checkpoints import Part, fill, improved_diffusion, read_checkpoint
from ptq_exp.diffusion.denoisers import UNetDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.diffusion.zoo.build import cosine_alphas_cumprod, empty_or_random, frozen, random_digest, torch_dtype
from ptq_exp.storage.atomic import file_digest

_STEPS, _LAYERS, _HEADS = 4000, 3, 4
# attn_norm_num_groups: without it the attention of the middle block would lose its norm under scale_shift
_COMMON = {
    "in_channels": 3, "out_channels": 6, "layers_per_block": _LAYERS, "norm_eps": 1e-5, "norm_num_groups": 32,
    "attn_norm_num_groups": 32, "resnet_time_scale_shift": "scale_shift",
}
_CIFAR10 = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": 64,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# attention_head_dim only has to divide both widths; the heads are set by `_four_heads`
_IMAGENET64 = {
    "sample_size": 64, "block_out_channels": (128, 256, 384, 512), "attention_head_dim": 128,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


def ddim_cifar10(
    checkpoint: str | None = None, *, name: str = "ddim_cifar10", dtype: str = "float32"
) -> DiffusionModel:
    """CIFAR-10, 52.5 M parameters, states [3, 32, 32]; sampled by DDIM, 250 of 4000 steps, x0 clipped.

    Args:
        checkpoint: `cifar10_uncond_50M_500K.pt` of improved-diffusion; None = random weights (warned about).
        name: what tables call it.
        dtype: of the denoiser: float32, bfloat16, float16 or float64.

    Raises:
        CheckpointError: the file cannot be read safely or is of another network.
        ConfigError: an unknown dtype.
    """
    return _build(_CIFAR10, checkpoint, name, dtype, "cifar10_uncond_50M_500K.pt of improved-diffusion")


def ddim_imagenet64(
    checkpoint: str | None = None, *, name: str = "ddim_imagenet64", dtype: str = "float32"
) -> DiffusionModel:
    """ImageNet 64x64 unconditional, 121 M parameters, states [3, 64, 64]; otherwise as `ddim_cifar10`.

    `checkpoint` is `imagenet64_uncond_100M_1500K.pt`.
    """
    return _build(_IMAGENET64, checkpoint, name, dtype, "imagenet64_uncond_100M_1500K.pt of improved-diffusion")


def _build(config: dict, checkpoint: str | None, name: str, dtype: str, wanted: str) -> DiffusionModel:
    number_type = torch_dtype(dtype)
    with empty_or_random(name, checkpoint):
        unet = UNet2DModel(**_COMMON, **config)
    if checkpoint is not None:
        rename = partial(improved_diffusion.unet, layers=_LAYERS, heads=lambda channels: _HEADS)
        fill([Part(unet, rename)], read_checkpoint(checkpoint), checkpoint, wanted=wanted)
    _four_heads(unet)
    return DiffusionModel(
        name=name,
        denoiser=frozen(UNetDenoiser(unet), number_type, checkpoint),
        schedule=NoiseSchedule(cosine_alphas_cumprod(_STEPS), time_scale=1000 / _STEPS, steps_offset=0),
        sample_shape=(3, config["sample_size"], config["sample_size"]),
        clip_sample=True,
        digest=random_digest(name) if checkpoint is None else file_digest(checkpoint),
        sampler=SamplerDefaults(250, "linspace", 0.0),
    )


def _four_heads(unet: nn.Module) -> None:
    """Set four heads at every width, for which `UNet2DModel` has no setting: it has the width of a head."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = _HEADS
            module.scale = (module.inner_dim / _HEADS) ** -0.5
