"""NaN in, NaN out: 8-bit integers have no NaN, and an engine would answer a number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def keep_nan(result: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """Return `result` with NaN for the samples whose inputs hold NaN, as the simulated network has it.

    Args:
        result: ``[N, ...]``, what an engine computed; whole numbers have no NaN.
        inputs: of the same call; those of N samples count, others (ranges, masks) do not.
    """
    if not result.is_floating_point() or not result.ndim:
        return result
    rows = [part for part in inputs if part.is_floating_point() and part.ndim and len(part) == len(result)]
    if not rows:
        return result
    lost = torch.stack([part.isnan().unsqueeze(1).flatten(1).any(1) for part in rows]).any(0).to(result.device)
    return result.masked_fill(lost.view(-1, *[1] * (result.ndim - 1)), torch.nan)
