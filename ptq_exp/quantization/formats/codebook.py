"""A codebook per row: the levels that minimise the row's squared error (Lloyd 1982, Max 1960)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq_exp.quantization.formats.blocks import BlockFormat, Encoded

STEPS = 24
"""Steps of Lloyd's iteration; later ones change the error by less than a thousandth."""
_ROWS = 1024


@dataclass(frozen=True)
class CodebookFormat(BlockFormat):
    """Codes of 2^width levels of the row's own, stored as float16 in units of its largest magnitude.

    Lloyd's iteration begins with equally spaced levels and draws no random number: the same row has the same levels.
    """

    width: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.width

    @property
    def weights_only(self) -> bool:
        """True: levels take `STEPS` passes over the data to find."""
        return True

    def scale_bits(self, length: int) -> int:
        """Return the bits of levels and largest magnitude."""
        return 16 * 2**self.width + 32

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Return the levels, float16 [..., 2^width], ascending, and the largest magnitudes, float32 [..., 1]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        amax = rows.abs().amax(1, keepdim=True)
        unit = rows / torch.where(amax == 0, 1.0, amax)
        levels = torch.cat([_lloyd(part, 2**self.width) for part in unit.split(_ROWS)]).half()
        shape = x.shape[:-1]
        return {"levels": levels.sort(1).values.reshape(*shape, -1), "row_scale": amax.reshape(*shape, 1)}

    def scale_like(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return levels and magnitudes of zero."""
        return {"levels": torch.zeros(*shape[:-1], 2**self.width, dtype=torch.float16),
                "row_scale": torch.zeros(*shape[:-1], 1)}

    def cast(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the nearest levels of the row."""
        found = self.decode(Encoded(self.encode_at(x, scales), dict(scales)))
        return torch.where(x.isnan(), x, found.to(x.dtype))

    def encode_at(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of the nearest levels."""
        levels = scales["levels"].float() * scales["row_scale"]
        between = (levels[..., 1:] + levels[..., :-1]) / 2
        return torch.searchsorted(between.contiguous(), x.float().contiguous()).to(torch.uint8)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return level times the row's largest magnitude."""
        levels = encoded.scales["levels"].float() * encoded.scales["row_scale"]
        return levels.gather(-1, encoded.codes.long())


def _lloyd(rows: Tensor, n: int) -> Tensor:
    """Return `n` levels [R, n] of rows [R, L] in [-1, 1]; levels that nothing is nearest to stay where they are."""
    values = rows.double().sort(1).values
    sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    low, high = values[:, :1], values[:, -1:]
    levels = low + (high - low) * torch.arange(n, device=rows.device).double() / (n - 1)
    for _ in range(STEPS):
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.nn.functional.pad(torch.searchsorted(values, between, right=True), (1, 1))
        ends[:, -1] = values.shape[1]
        count = ends.diff(dim=1)
        mean = sums.gather(1, ends).diff(dim=1) / count.clamp(min=1)
        levels = torch.where(count > 0, mean, levels)
    return levels


CODEBOOKS = {f"codebook{width}": CodebookFormat(f"codebook{width}", None, width) for width in (4, 3, 2)}
