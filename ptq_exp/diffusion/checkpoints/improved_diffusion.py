"""U-Nets of improved-diffusion (Nichol and Dhariwal 2021), a layout that latent diffusion took over.

The original numbers its blocks through: `input_blocks.0.0` is the first convolution, then every level has its residual
blocks and, but for the last, a downsampling block; `output_blocks` start at the coarsest level and have one residual
block more per level, with the upsampling convolution as the last entry of the level's last block. `diffusers` counts
levels and blocks within them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")
_MIDDLE_PLACES = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}


def unet(key: str, tensor: Tensor, *, layers: int, heads: Callable[[int], int] | None) -> dict[str, Tensor]:
    """One tensor of the original -> its tensors in the `diffusers` U-Net (three for a fused qkv), {} if unknown.

    Args:
        layers: residual blocks per level on the way down.
        heads: number of attention heads for a number of channels; None = spatial transformers, whose inner names are
            the same on both sides.
    """
    module, _, leaf = key.rpartition(".")
    if module in _ENDS:
        return {f"{_ENDS[module]}.{leaf}": tensor}
    place, inner = _place(module, layers)
    if place is None:
        return {}
    kind = place.split(".")[-2]
    if kind == "resnets":
        return {f"{place}.{_RESNET[inner]}.{leaf}": tensor} if inner in _RESNET else {}
    if kind == "attentions":
        return _attention(f"{place}.", inner, leaf, tensor, heads)
    return {f"{place}.conv.{leaf}": tensor}


def _place(module: str, layers: int) -> tuple[str | None, str]:
    """Return the `diffusers` block of `module`, and the name inside it; (None, "") if there is none."""
    if middle := _MIDDLE.fullmatch(module):
        return _MIDDLE_PLACES.get(int(middle[1])), middle[2]
    block = _BLOCK.fullmatch(module)
    if block is None:
        return None, ""
    side, index, entry, inner = block[1], int(block[2]), int(block[3]), block[4]
    level, slot = divmod(index - (side == "input_blocks"), layers + 1)
    prefix = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if inner == "op" and slot == layers and side == "input_blocks":
        return f"{prefix}.downsamplers.0", inner
    if inner == "conv" and slot == layers and side == "output_blocks":
        return f"{prefix}.upsamplers.0", inner
    return f"{prefix}.{'resnets' if entry == 0 else 'attentions'}.{slot}", inner


def _attention(
    prefix: str, inner: str, leaf: str, tensor: Tensor, heads: Callable[[int], int] | None
) -> dict[str, Tensor]:
    if heads is None:
        return {f"{prefix}{inner}.{leaf}": tensor}
    if inner == "norm":
        return {f"{prefix}group_norm.{leaf}": tensor}
    if inner == "proj_out":
        return {f"{prefix}to_out.0.{leaf}": as_linear(tensor)}
    if inner == "qkv":
        return {f"{prefix}to_{name}.{leaf}": part for name, part in split_qkv(as_linear(tensor), heads).items()}
    return {}


def as_linear(tensor: Tensor) -> Tensor:
    """Return the weight of a convolution of width 1, [out, in, 1(, 1)], as that of a linear layer; a bias as it is."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def split_qkv(tensor: Tensor, heads: Callable[[int], int]) -> dict[str, Tensor]:
    """Split a fused weight [3 C, C] or bias [3 C] into {"q", "k", "v"}: rows run over (head, which one, channel).

    A tensor that cannot be divided so belongs to another network; its rows come back in three unequal parts, for the
    comparison of shapes to name it.
    """
    channels = len(tensor) // 3
    number = max(heads(channels), 1)
    if len(tensor) % (3 * number):
        return dict(zip("qkv", tensor.tensor_split(3), strict=True))
    parts = tensor.reshape(number, 3, channels // number, *tensor.shape[1:])
    return {name: parts[:, i].reshape(channels, *tensor.shape[1:]) for i, name in enumerate("qkv")}
