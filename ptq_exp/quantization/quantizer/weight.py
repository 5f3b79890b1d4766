"""`WeightQuantizer`: ranges found from a weight, which is then frozen, and the integers that it stands for."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.affine import QRange
from ptq_exp.quantization.quantizer.base import Quantizer, columns
from ptq_exp.quantization.ranges.range_search import search_range

_CHUNK = 1 << 22  # values of a weight whose integers are found at once


class WeightQuantizer(Quantizer):
    """Quantizer of a weight ``[out_channels, in_channels / groups, *kernel]``.

    Buffers ``[out_channels, segments]`` (per output channel) or ``[1, segments]`` (per tensor). Once frozen,
    the parameter itself holds the quantized values and the quantizer is the identity.
    """

    def __init__(self, bits: int, **settings) -> None:
        super().__init__(bits, **settings)
        self.register_buffer("frozen", torch.tensor(False))
        self.baked = False  # mirrors `frozen`, as `ready` mirrors `calibrated`

    def forward(self, weight: Tensor) -> Tensor:
        """As `Quantizer.forward`; the identity once the weight is frozen."""
        return weight if self.baked else super().forward(weight)

    @torch.no_grad()
    def search(self, weight: Tensor, metric: str) -> None:
        """Search the ranges that minimise `metric` (or the quantizer's own) over `weight`.

        Raises:
            QuantizationError: the weight is already frozen, i.e. no longer the full-precision one.
            PTQError: `weight` holds NaN or infinity; the message names the layer.
        """
        self.check_fresh()
        found = [self.range_search(part, self.metric or metric) for part in self.split(weight)]
        self.set_range(columns(found, self.scale.shape[0]))

    def range_search(self, part: Tensor, metric: str) -> QRange:
        """Search the ranges of a segment of the weight."""
        axis = 0 if self.scale.shape[0] > 1 else None
        return search_range(
            part, self.bits, symmetric=self.symmetric, channel_axis=axis, metric=metric, name=self.name
        )

    def check_fresh(self) -> None:
        """Raise QuantizationError if the weight is frozen."""
        if self.baked:
            raise QuantizationError(
                f"{self.name}: the weight is already quantized and frozen; "
                "start from the full-precision model to calibrate it again"
            )

    def stored_bytes(self, weight: Tensor) -> float:
        """Return the size of the integers of `weight`, 4 bytes per scale and ceil(bits / 8) per zero point."""
        per_range = 4 if self.symmetric else 4 + -(-self.bits // 8)
        return weight.numel() * self.bits / 8 + self.scale.numel() * per_range

    @torch.no_grad()
    def freeze(self, weight: nn.Parameter) -> None:
        """Replace the values of `weight` by their quantized ones, once; a frozen weight is left alone."""
        if not self.baked:
            weight.copy_(Quantizer.forward(self, weight))
            self.frozen.fill_(True)
            self.baked = True

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """Return the integers q - qmin of a frozen `weight`, int32 >= 0 of its shape; `restore` inverts it.

        Raises:
            QuantizationError: the weight is not frozen, or not exactly on the grid of its ranges.
        """
        if not self.baked:
            raise QuantizationError(f"{self.name}: the weight is not frozen and has no integers; calibrate it first")
        found, left = self._search(weight)
        if off := int(left.sum()):
            raise QuantizationError(
                f"{self.name}: {off} of {weight.numel()} weights are not on the grid of their ranges: they were "
                "changed after they had been quantized"
            )
        return found

    def codes(self, values: Tensor) -> Tensor:
        """Return integers q - qmin that stand for `values` of the weight's shape, int32; 0 where none does."""
        return self._search(values)[0]

    def _search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `codes` does, and where no integer stands for a value: bool, of its shape."""
        found = torch.zeros_like(values, dtype=torch.int32)
        left = torch.ones_like(values, dtype=torch.bool)
        # some rows at a time, as it takes several copies of them; of two and more, whose scales are never 0-d
        several = len(cast("Tensor", self.scale)) > 1
        parts = max(1, min(len(values) // 2, -(-values.numel() // _CHUNK)))
        for rows in torch.arange(len(values), device=values.device).tensor_split(parts):
            place = slice(int(rows[0]), int(rows[-1]) + 1)
            self._search_rows(values[place], found[place], left[place], rows if several else None)
        return found, left

    def _search_rows(self, values: Tensor, found: Tensor, left: Tensor, rows: Tensor | None) -> None:
        """Fill in `found` and `left` for some rows of a weight, or for all (None)."""
        scale, lowest, highest = self._levels(values, rows)
        nearest = torch.div(values, scale).round_().float()
        # in 16-bit types a quotient can be off by one, and two levels can be one number: any that gives it will do
        for shift in (0, -1, 1):
            integers = (nearest + shift).clamp_(lowest, highest).sub_(lowest).to(torch.int32)
            same = (self._values(integers, values, rows) == values).logical_and_(left)
            found.copy_(torch.where(same, integers, found))
            left ^= same
            if not left.any():
                break

    @torch.no_grad()
    def restore(self, weight: nn.Parameter, integers: Tensor) -> None:
        """Fill and freeze `weight` with what `integers` took from a weight with the same ranges."""
        weight.copy_(self._values(integers.to(weight.device), weight))
        self.frozen.fill_(True)
        self.baked = True

    def _values(self, integers: Tensor, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what `integers` stand for, in the type of the weight `like`, by the arithmetic of `fake_quantize`."""
        scale, lowest, _ = self._levels(like, rows)
        # a 0-d scale leaves the type of the weight alone, as it does there
        kind = torch.promote_types(like.dtype, scale.dtype) if scale.ndim else like.dtype
        return (integers + lowest).to(kind).mul_(scale).to(like.dtype)

    def _levels(self, weight: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, lowest and highest level (counted from the zero point), each broadcasting against `weight`.

        Args:
            rows: those that `weight` has of the whole one; None = all.
        """
        scale, zero_point, qmin, qmax = (self._aligned(getattr(self, f), weight, rows) for f in QRange._fields)
        return scale, qmin - zero_point, qmax - zero_point

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.baked = bool(self.frozen)
