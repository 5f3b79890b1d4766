"""Microscaling formats (OCP MX 1.0): blocks of 32 values with a power of two as scale, stored in 8 bits (E8M0).

The exponent of a scale is read from the bits of the block's largest value; a logarithm in floating point is off by one
next to powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.formats.blocks import BlockFormat, Encoded, in_blocks, in_rows, widened
from ptq_exp.quantization.formats.elementwise import ELEMENTWISE, FloatFormat

SCALE_RULES = ("floor", "ceil", "even", "rceil")
BIAS, NAN = 127, 255
"""Of E8M0: the code c stands for 2^(c - 127), the last one for NaN."""


@dataclass(frozen=True)
class SixtyFourths:
    """The element of MXINT8: k / 64 with |k| <= 127, in two's complement; -128 is never used."""

    name = "int8_s1p6"
    bits, largest, largest_exponent, mantissa_bits = 8, 127 / 64, 0, 6

    @property
    def values(self) -> Tensor:
        """The value of every code, float64 [256]."""
        return torch.arange(256).to(torch.uint8).view(torch.int8).double() / 64

    def cast(self, x: Tensor) -> Tensor:
        """Return the nearest value to each of `x`, ties to the even k."""
        return (x * 64).round_().clamp_(-127, 127).div_(64)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code of the nearest value to each of `x`, uint8."""
        return (self.cast(x) * 64).to(torch.int8).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`, float32."""
        return codes.view(torch.int8).float() / 64


@dataclass(frozen=True)
class MXFormat(BlockFormat):
    """A microscaling format: elements times 2^e, where e is that of the block.

    Attributes:
        element: format of the elements.
        rule: how e follows from the largest magnitude of the block, amax: `floor`, floor(log2 amax) - emax (OCP, and
            the largest values saturate); `ceil`, the same rounded up; `even`, amax is rounded to the mantissa of the
            elements first; `rceil`, the smallest power that saturates nothing.

    Raises:
        ConfigError: there is no such rule.
    """

    element: FloatFormat | SixtyFourths
    rule: str = "floor"

    def __post_init__(self) -> None:
        if self.rule not in SCALE_RULES:
            raise ConfigError(f"MXFormat.rule={self.rule!r}: choose one of {', '.join(SCALE_RULES)}")

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.element.bits

    @cached_property
    def values(self) -> Tensor:
        """The value of every code of an element, float64."""
        return self.element.values

    @property
    def elements(self) -> Tensor:
        """As `BlockFormat.elements`; some codes are never used."""
        return torch.unique(self.element.cast(self.values[self.values.isfinite()]))

    def scale_bits(self, length: int) -> int:
        """Return 8 bits for each block."""
        return 8 * self.blocks(length)

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Return the codes of the block scales, uint8 [..., blocks]."""
        amax = in_blocks(x, self.block).abs().amax(-1)
        exponent = (self._exponent(amax) + BIAS).clamp_(0, 2 * BIAS)
        code = torch.where(amax.isnan(), NAN, torch.where(amax == 0, 0, exponent))
        return {"block_scale": code.to(torch.uint8)}

    def scale_like(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return codes of zero."""
        return {"block_scale": torch.zeros(*shape[:-1], self.blocks(shape[-1]), dtype=torch.uint8)}

    def cast(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the nearest values at these scales; a value beyond float32 becomes its largest."""
        code = scales["block_scale"]
        elements = self.element.cast(self._divided(x, code))
        return self._multiplied(elements, code, x.shape[-1])

    def encode_at(self, x: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of the nearest elements at these scales."""
        return in_rows(self.element.encode(self._divided(x, scales["block_scale"])), x.shape[-1])

    def decode(self, encoded: Encoded) -> Tensor:
        """Return element times scale."""
        elements = in_blocks(self.element.decode(encoded.codes), self.block)
        return self._multiplied(elements, encoded.scales["block_scale"], encoded.codes.shape[-1])

    def _divided(self, x: Tensor, code: Tensor) -> Tensor:
        return in_blocks(x, self.block) * _powers(-1, x)[code.long()].unsqueeze(-1)

    def _multiplied(self, elements: Tensor, code: Tensor, length: int) -> Tensor:
        most = torch.finfo(torch.float32).max
        return in_rows(elements * _powers(1, elements)[code.long()].unsqueeze(-1), length).clamp_(-most, most)

    def _exponent(self, amax: Tensor) -> Tensor:
        """Return the exponent of the scale of blocks with this largest magnitude; of infinity as of 2^128."""
        if self.rule == "rceil":
            inverse = torch.tensor(1 / self.element.largest, dtype=torch.float32)
            return _ceil_log2(amax.float() * inverse)
        if self.rule == "ceil":
            return _ceil_log2(amax) - self.element.largest_exponent
        if self.rule == "even":
            kept = self.element.mantissa_bits
            amax = amax.float()
            half = 1 << 22 - kept
            rounded = (amax.view(torch.int32) + half).view(torch.float32)
            amax = torch.where(rounded.isfinite(), rounded, torch.inf)
        return _floor_log2(amax) - self.element.largest_exponent


def _floor_log2(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 128, torch.frexp(widened(x)).exponent - 1)


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(widened(x))
    return torch.where(x.isinf(), 128, exponent - (mantissa == 0.5).int())


def _powers(sign: int, like: Tensor) -> Tensor:
    """Value of every code of E8M0 to the power `sign`, of the type and device of `like`."""
    table = torch.ldexp(torch.ones(256, dtype=torch.float64), sign * (torch.arange(256) - BIAS))
    table[NAN] = torch.nan
    return table.to(like)


_ELEMENTS = {
    "mxfp8_e4m3": ELEMENTWISE["fp8_e4m3fn"], "mxfp8_e5m2": ELEMENTWISE["fp8_e5m2"],
    "mxfp6_e2m3": ELEMENTWISE["fp6_e2m3"], "mxfp6_e3m2": ELEMENTWISE["fp6_e3m2"], "mxfp4": ELEMENTWISE["fp4_e2m1"],
    "mxint8": SixtyFourths(),
}
MICROSCALING = {name: MXFormat(name, 32, element) for name, element in _ELEMENTS.items()}
