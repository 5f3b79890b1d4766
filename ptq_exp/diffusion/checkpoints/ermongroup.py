"""U-Nets of the PyTorch DDIM code of ermongroup (Song et al. 2021), a port of the DDPM network of Ho et al. 2020.

Levels of the way up are numbered like those of the way down, finest first; `diffusers` numbers them as they run. The
autoencoders of latent diffusion have the same blocks.
"""

from __future__ import annotations

import re

from torch import Tensor

from ptq_exp.diffusion.checkpoints.improved_diffusion import as_linear

_ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
           "temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_LEVEL = re.compile(r"(down|up)\.(\d+)\.(?:(block|attn)\.(\d+)\.(\w+)|(downsample|upsample)\.conv)")


def unet(key: str, tensor: Tensor, *, levels: int) -> dict[str, Tensor]:
    """One tensor of the original -> its tensor in the `diffusers` layout, {} if unknown."""
    module, _, leaf = key.rpartition(".")
    name = _ENDS.get(module) or _middle(module) or _level(module, levels)
    if name is None:
        return {}
    return {f"{name}.{leaf}": as_linear(tensor) if ".to_" in name else tensor}


def _middle(module: str) -> str | None:
    head, block, inner = (*module.split("."), "", "")[:3]
    names = _ATTENTION if block.startswith("attn") else _RESNET
    if head != "mid" or block not in _MIDDLE or inner not in names:
        return None
    return f"mid_block.{_MIDDLE[block]}.{names[inner]}"


def _level(module: str, levels: int) -> str | None:
    found = _LEVEL.fullmatch(module)
    if found is None:
        return None
    side, level, kind, slot, inner, sampler = found.groups()
    prefix = f"{side}_blocks.{int(level) if side == 'down' else levels - 1 - int(level)}"
    if sampler is not None:
        return f"{prefix}.{sampler}rs.0.conv"
    names = _ATTENTION if kind == "attn" else _RESNET
    return f"{prefix}.{'attentions' if kind == 'attn' else 'resnets'}.{slot}.{names[inner]}" if inner in names else None
