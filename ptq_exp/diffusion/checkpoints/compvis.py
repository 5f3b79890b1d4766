"""Checkpoints of latent diffusion (Rombach et al. 2022): U-Net, VQ first stage and class embedding in one file."""

from __future__ import annotations

from torch import Tensor

from ptq_exp.diffusion.checkpoints import ermongroup, improved_diffusion

UNET, FIRST_STAGE, CLASSES, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)
UNUSED = (*SCHEDULE_BUFFERS, "loss.*", "first_stage_model.loss.*")
"""Patterns of what a file may hold without being part of the network: recomputed schedules, training losses."""
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
_CODEBOOK = ("quantize.embedding.weight", "quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight",
             "post_quant_conv.bias")
_LAYERS, _CHANNELS_PER_HEAD, _FIRST_STAGE_LEVELS = 2, 32, 3


def conditional_unet(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """LDM-4's class-conditional U-Net: residual blocks as improved-diffusion names them, spatial transformers."""
    return improved_diffusion.unet(key, tensor, layers=_LAYERS, heads=None)


def unconditional_unet(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the unconditional U-Nets: attention with fused qkv, a head for every 32 channels."""
    return improved_diffusion.unet(key, tensor, layers=_LAYERS, heads=lambda channels: channels // _CHANNELS_PER_HEAD)


def vq_first_stage(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the VQ autoencoder with f = 4: three levels, one codebook."""
    if key in _CODEBOOK:
        return {key: tensor}
    side, _, inner = key.partition(".")
    if side not in ("encoder", "decoder"):
        return {}
    return {f"{side}.{name}": value for name, value in
            ermongroup.unet(inner, tensor, levels=_FIRST_STAGE_LEVELS).items()}


def class_embedding(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the embedding of class labels, the last one meaning "no class"."""
    return {"weight": tensor} if key == "embedding.weight" else {}


def with_ema(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with the averaged weights in place of those of the last training step.

    An average is stored under the weight's name without dots. A weight without average is left out and an average
    without weight stays under its own name, so that both are found as missing and unexpected.
    """
    chosen = {key: value for key, value in state.items() if not key.startswith("model.")}
    for key in state:
        average = EMA + key.removeprefix("model.").replace(".", "")
        if key.startswith("model.") and average in chosen:
            chosen[key] = chosen.pop(average)
    return chosen


def has_ema(state: dict[str, Tensor]) -> bool:
    """Whether the file holds averaged weights (their counters alone do not count)."""
    return any(key.startswith(EMA) and key not in EMA_COUNTERS for key in state)
