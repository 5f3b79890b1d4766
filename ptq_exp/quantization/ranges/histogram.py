"""Streaming histogram of calibration activations: bounded memory, independent of the order of the batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError

# Data that stays below 2^-60 shares one bin width: it lies under the smallest scale anyway.
MIN_EXPONENT = -60
# Elements counted at once; bounds the temporaries.
CHUNK = 1 << 18


class Histogram:
    """Counts over bins aligned at zero: bin j of cell c covers [j, j + 1) * 2^exponent[c] * 2 / bins.

    j runs from -bins/2 to bins/2 - 1. Where a batch exceeds the covered range, bins merge in pairs (or 2^k at
    once). As bin widths are powers of two and zero is always an edge, merging old counts gives exactly what
    counting with the wider bins from the start would have given: the state depends on the multiset of values
    seen, never on their order or on the split into batches.

    Exact zeros are counted apart (`zeros`): every quantizer here reproduces them, so they carry no error.

    Args:
        cells: number of histograms. bins: a power of two. name: layer to name in an error.
        device: of the counts, which follow the batches.

    Attributes:
        min, max: [cells] float32. counts: [cells, bins] int64. zeros: [cells] int64.
        count: [cells] int64, all values seen. exponent: [cells] int64, |x| < 2^exponent for all of them.
    """

    def __init__(
        self, cells: int, bins: int, name: str | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        self.cells, self.bins, self.name = cells, bins, name
        self.min = torch.full((cells,), torch.inf, device=device)
        self.max = torch.full((cells,), -torch.inf, device=device)
        self.exponent = torch.full((cells,), MIN_EXPONENT, device=device)
        self.counts = torch.zeros(cells, bins, dtype=torch.int64, device=device)
        self.zeros, self.count = (torch.zeros(cells, dtype=torch.int64, device=device) for _ in range(2))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count one batch, `x` [cells, n]. Raises QuantizationError on NaN or infinity, naming the layer."""
        if x.ndim != 2 or x.shape[0] != self.cells:
            raise QuantizationError(
                f"{describe(self.name)}: found a batch of shape {list(x.shape)}, expected [{self.cells}, n]"
            )
        if x.shape[1] == 0:
            return
        if self.counts.device != x.device:
            self._to(x.device)
        x = x.detach().float()
        low, high = finite_ends(x, self.name)
        self.min, self.max = torch.minimum(self.min, low), torch.maximum(self.max, high)
        largest = torch.maximum(high, -low)
        self._widen(torch.frexp(largest).exponent.long().masked_fill_(largest == 0, MIN_EXPONENT))
        for columns in x.split(max(CHUNK // self.cells, self.bins), dim=1):
            self._count(columns)
        self.count += x.shape[1]

    @property
    def width(self) -> Tensor:
        """Bin width per cell, [cells, 1] float32."""
        return torch.ldexp(torch.ones_like(self.min), self.exponent + 1 - int(math.log2(self.bins)))[:, None]

    def occupied(self) -> tuple[int, Tensor]:
        """Signed number of the first bin any cell uses, and the counts [cells, used bins] from there on."""
        used = (self.counts > 0).any(0).nonzero().flatten()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (self.bins // 2, self.bins // 2)
        return first - self.bins // 2, self.counts[:, first:last + 1]

    def coarsened(self, bins: int) -> Histogram:
        """Return the same data on fewer bins (`bins` a power of two below the present number)."""
        coarse = Histogram(self.cells, bins, self.name, device=self.counts.device)
        coarse.min, coarse.max, coarse.exponent = self.min, self.max, self.exponent
        coarse.zeros, coarse.count = self.zeros, self.count
        coarse.counts = self.counts.view(self.cells, bins, -1).sum(-1)
        return coarse

    def percentile(self, fraction: float) -> tuple[Tensor, Tensor]:
        """Find the ends [cells]: at least `fraction` of the values is not above the upper, nor below the lower one.

        Exact up to a bin: the outer edge of the bin that holds the value of that rank, or the extreme value.
        """
        half = self.bins // 2
        whole = self.counts.clone()
        whole[:, half] += self.zeros
        rank = torch.ceil(self.count.double() * fraction).long()[:, None]
        above = torch.searchsorted(whole.cumsum(1), rank).squeeze(1) + 1 - half
        below = half - 1 - torch.searchsorted(whole.flip(1).cumsum(1), rank).squeeze(1)
        width = self.width.squeeze(1)
        return torch.maximum(self.min, below * width), torch.minimum(self.max, above * width)

    def _count(self, x: Tensor) -> None:
        bin_number = (x / self.width).floor_().to(torch.int32)
        offset = torch.arange(self.cells, device=x.device, dtype=torch.int32)[:, None] * self.bins
        flat = bin_number.add_(offset + self.bins // 2).flatten()
        counts = torch.bincount(flat, minlength=self.cells * self.bins)
        zeros = (x == 0).float().sum(1).long()  # exact: a chunk has fewer than 2^24 columns
        self.counts += counts.view(self.cells, self.bins)
        self.counts[:, self.bins // 2] -= zeros
        self.zeros += zeros

    def _widen(self, exponent: Tensor) -> None:
        """Merge bins so that |x| < 2^exponent fits; cells whose range suffices stay as they are."""
        growth = (exponent - self.exponent).clamp_(min=0)
        half = self.bins // 2
        for k in growth.unique().tolist():
            if k == 0:
                continue
            rows = growth == k
            factor = 1 << min(k, half.bit_length())
            old = self.counts[rows]
            number = torch.arange(-half, half, device=old.device) // factor + half
            self.counts[rows] = torch.zeros_like(old).index_add_(1, number, old)
        self.exponent = self.exponent + growth

    def _to(self, device: torch.device) -> None:
        for key in ("min", "max", "exponent", "counts", "zeros", "count"):
            setattr(self, key, getattr(self, key).to(device))


def finite_ends(x: Tensor, name: str | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row of `x` [cells, n]; QuantizationError on NaN or infinity."""
    low, high = x.amin(1), x.amax(1)  # an order of magnitude faster than aminmax(dim=1)
    if not torch.isfinite(high - low).all():
        nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
        raise QuantizationError(
            f"{describe(name)}: found {nan} NaN and {infinite} infinite values among {x.numel()}, expected a "
            "finite range; check the checkpoint and the calibration data"
        )
    return low, high


def describe(name: str | None) -> str:
    """How an error message calls the layer `name`."""
    return f"layer {name!r}" if name else "range search"
