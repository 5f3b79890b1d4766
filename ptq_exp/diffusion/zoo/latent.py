"""Latent diffusion (Rombach et al. 2022): LDM-4 on ImageNet 256x256 and on LSUN bedrooms, both with VQ-f4."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

from ptq_exp.diffusion.checkpoints import Part, check_schedule, compvis, fill, read_checkpoint
from ptq_exp.diffusion.denoisers import ClassConditionalUNet, FirstStage, UNetDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.diffusion.zoo.build import empty_or_random, frozen, random_digest, torch_dtype
from ptq_exp.errors import CheckpointError
from ptq_exp.storage.atomic import file_digest

_CLASSES, _CONTEXT = 1000, 512
_LATENT, _IMAGE = (3, 64, 64), (3, 256, 256)
_IMAGENET = "LDM-4 `cin256-v2` (models/ldm/cin256-v2/model.ckpt of latent-diffusion)"
_BEDROOMS = "LDM-4 LSUN-Bedrooms (models/ldm/lsun_beds256/model.ckpt of latent-diffusion)"


def ldm4_imagenet256(
    checkpoint: str | None = None, *, name: str = "ldm4_imagenet256", dtype: str = "float32"
) -> DiffusionModel:
    """Class-conditional ImageNet 256x256: U-Net of 401 M parameters over latents [3, 64, 64], 1000 classes.

    Published samples: DDIM, 20 steps, eta 0, guidance scale 3. Label 1000 means "no class".

    Args:
        checkpoint: `model.ckpt` of `cin256-v2`; None = random weights (warned about).
        name: what tables call it.
        dtype: of the denoiser: float32, bfloat16, float16 or float64; the first stage stays in float32.

    Raises:
        CheckpointError: the file cannot be read safely, is of another network or of another noise schedule.
        ConfigError: an unknown dtype.
    """
    number_type = torch_dtype(dtype)
    with empty_or_random(name, checkpoint):
        unet, first_stage, embedding = conditional_unet(), _vq_f4(), nn.Embedding(_CLASSES + 1, _CONTEXT)
    schedule = NoiseSchedule.latent_diffusion()
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        parts = [Part(unet, compvis.conditional_unet, compvis.UNET), _first_stage_part(first_stage),
                 Part(embedding, compvis.class_embedding, compvis.CLASSES)]
        fill(parts, state, checkpoint, wanted=_IMAGENET, unused=compvis.UNUSED)
        check_schedule(state, schedule, checkpoint)
    return DiffusionModel(
        name=name,
        denoiser=frozen(ClassConditionalUNet(unet, embedding), number_type, checkpoint),
        schedule=schedule,
        sample_shape=_LATENT,
        clip_sample=False,
        digest=random_digest(name) if checkpoint is None else file_digest(checkpoint),
        first_stage=frozen(FirstStage(first_stage)),
        n_classes=_CLASSES,
        null_label=_CLASSES,
        sampler=SamplerDefaults(20, "leading", 0.0, 3.0),
        image_shape=_IMAGE,
        blocks=("*resnets.*", "*transformer_blocks.*"),
    )


def ldm4_lsun_bedrooms256(
    checkpoint: str | None = None, *, name: str = "ldm4_lsun_bedrooms256", dtype: str = "float32", ema: bool = True
) -> DiffusionModel:
    """Unconditional LSUN bedrooms 256x256: U-Net of 274 M parameters over latents [3, 64, 64].

    Published samples: DDIM, 200 steps, eta 1. Arguments and errors as in `ldm4_imagenet256`, and:

    Args:
        ema: take the averaged weights, as latent diffusion samples; False = those of the last training step, as
            Q-Diffusion samples.
    """
    number_type = torch_dtype(dtype)
    with empty_or_random(name, checkpoint):
        unet, first_stage = _unconditional_unet(), _vq_f4()
    schedule = NoiseSchedule.latent_diffusion()
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        check_schedule(state, schedule, checkpoint)
        parts = [Part(unet, compvis.unconditional_unet, compvis.UNET), _first_stage_part(first_stage)]
        state, unused = _chosen(state, ema, checkpoint)
        fill(parts, state, checkpoint, wanted=_BEDROOMS, unused=unused)
    return DiffusionModel(
        name=name,
        denoiser=frozen(UNetDenoiser(unet), number_type, checkpoint),
        schedule=schedule,
        sample_shape=_LATENT,
        clip_sample=False,
        digest=random_digest(name) if checkpoint is None else f"{file_digest(checkpoint)}{'-ema' if ema else ''}",
        first_stage=frozen(FirstStage(first_stage)),
        sampler=SamplerDefaults(200, "leading", 1.0),
        image_shape=_IMAGE,
    )


def _chosen(state: dict, ema: bool, checkpoint: str) -> tuple[dict, Sequence[str]]:
    """Return the state dict with the weights asked for under the U-Net's names, and the patterns left unused."""
    if not ema:
        return state, (*compvis.UNUSED, f"{compvis.EMA}*")
    # another network is reported by `fill`; only the right one without averages is a question of the setting
    if any(key.startswith(compvis.UNET) for key in state) and not compvis.has_ema(state):
        raise CheckpointError(
            f"model.checkpoint={checkpoint}: holds no averaged (EMA) weights; set model.ema=false for those of the "
            "last training step"
        )
    return compvis.with_ema(state), (*compvis.UNUSED, *compvis.EMA_COUNTERS)


def _first_stage_part(first_stage: nn.Module) -> Part:
    return Part(first_stage, compvis.vq_first_stage, compvis.FIRST_STAGE)


def conditional_unet() -> UNet2DConditionModel:
    """Return the U-Net of `ldm4_imagenet256` with random weights, or with none under ``torch.device("meta")``."""
    # attention_head_dim is the number of heads here
    return UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960), layers_per_block=2,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        cross_attention_dim=_CONTEXT, attention_head_dim=1, norm_eps=1e-5,
    )


def _unconditional_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(224, 448, 672, 896), layers_per_block=2,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"), attention_head_dim=32, norm_eps=1e-5,
    )


def _vq_f4() -> VQModel:
    """55 M parameters, images [3, 256, 256] <-> latents [3, 64, 64], 8192 codes; latents are not scaled."""
    return VQModel(
        block_out_channels=(128, 256, 512), layers_per_block=2, latent_channels=3, sample_size=256,
        num_vq_embeddings=8192, vq_embed_dim=3, norm_num_groups=32, scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )
