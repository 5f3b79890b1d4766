"""Random masks and their generators: all draws of a block depend on (seed, name of the block) alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LEVELS = 1 << 16


def block_generator(seed: int, block: str, what: str, device: torch.device) -> torch.Generator:
    """Return a generator on `device` for the draws of one kind, `what`, in `block`."""
    digest = hashlib.sha256(f"reconstruction {seed} {block} {what}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)


def random_mask(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """1 with `probability`, to the nearest 1/65536, else 0; shape and dtype of `like`, on the generator's device.

    16 random bits per element: several times faster on a CPU than to draw a float for each.
    """
    levels = round(probability * _LEVELS)
    if levels in (0, _LEVELS):
        return torch.full_like(like, float(levels > 0))
    n = like.numel()
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=generator.device)
    bits = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[:n]
    return (bits < levels - _LEVELS // 2).to(like.dtype).view(like.shape)
