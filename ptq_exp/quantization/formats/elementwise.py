"""Floating-point formats of 8 bits and fewer: a sign, an exponent and a mantissa, value by value.

The formats of the OCP Microscaling specification (version 1.0, section 5.3) and of its 8-bit predecessor (OFP8): code =
sign bit, exponent, mantissa from the top. Values are rounded to nearest, ties to the even code, and saturate: infinity,
too, becomes the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# mantissa bits, exponent bias and an integer type of the same size
_LAYOUTS = {torch.float32: (23, 127, torch.int32), torch.float64: (52, 1023, torch.int64)}


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format without scales; `scale * cast(x / scale)` quantizes by it.

    Attributes:
        name: key in `FORMATS`.
        exponent_bits, mantissa_bits, bias: the largest exponent is that of values too, unless `infinity`.
        infinity: the largest exponent is that of infinity and NaN, as in IEEE 754.
        nan: the codes with all other bits set are NaN; False = all codes are numbers, and NaN becomes 0.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinity: bool = False
    nan: bool = False
    block = None  # of block formats: values that share a scale
    weights_only = tensor_scale = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bits_per_value(self) -> float:
        """Bits of a code: the scale of a tensor or channel is counted with its range."""
        return float(self.bits)

    @cached_property
    def values(self) -> Tensor:
        """The value of every code, float64 [2^bits], NaN and infinity among them."""
        code = torch.arange(1 << self.bits - 1)
        field, mantissa = code >> self.mantissa_bits, code & (1 << self.mantissa_bits) - 1
        normal = (field > 0).double()
        exponent = field.clamp(min=1) - self.bias - self.mantissa_bits
        found = torch.ldexp(mantissa.double() + normal * (1 << self.mantissa_bits), exponent)
        if self.infinity:
            top = field == (1 << self.exponent_bits) - 1
            found = torch.where(top, torch.where(mantissa == 0, torch.inf, torch.nan), found)
        elif self.nan:
            found[-1] = torch.nan
        return torch.cat((found, -found))

    @property
    def elements(self) -> Tensor:
        """The finite values, ascending, float64."""
        return torch.unique(self.values[self.values.isfinite()])

    @cached_property
    def largest(self) -> float:
        """The largest value."""
        return float(self.values[self.values.isfinite()].max())

    @cached_property
    def largest_exponent(self) -> int:
        """The exponent of the largest value, emax."""
        return int(torch.frexp(torch.tensor(self.largest, dtype=torch.float64)).exponent) - 1

    def cast(self, x: Tensor) -> Tensor:
        """Return the nearest value to each of `x`, of its shape and type; the sign of zero is kept."""
        x = torch.as_tensor(x)
        if x.dtype not in _LAYOUTS:
            return self.cast(x.float()).to(x.dtype)
        x = x.detach()
        mantissa, bias, integer = _LAYOUTS[x.dtype]
        # the exponent of x, as the bits of a power of two; below the smallest normal value steps are constant
        field = x.view(integer).bitwise_and((2 * bias + 1) << mantissa)
        step = field.clamp_(min=(1 - self.bias + bias) << mantissa).sub_(self.mantissa_bits << mantissa).view(x.dtype)
        found = torch.div(x, step).round_().mul_(step).clamp_(-self.largest, self.largest)
        return found if self.nan else found.nan_to_num_(nan=0.0)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code of the nearest value to each of `x`, uint8 of its shape."""
        found = self.cast(torch.as_tensor(x)).double()
        numbers = self.values[: 1 << self.bits - 1]
        numbers = numbers[numbers.isfinite()].to(found.device)
        code = torch.searchsorted(numbers, found.abs().nan_to_num(nan=0.0).contiguous())
        code += torch.signbit(found).long() << self.bits - 1
        if self.nan:
            code = torch.where(found.isnan(), (1 << self.bits - 1) - 1, code)
        return code.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`, float32 of their shape."""
        return self.values.to(codes.device)[codes.long()].float()


ELEMENTWISE = {
    made.name: made for made in (
        FloatFormat("fp8_e4m3fn", 4, 3, 7, nan=True),
        FloatFormat("fp8_e5m2", 5, 2, 15, infinity=True, nan=True),
        FloatFormat("fp6_e2m3", 2, 3, 1),
        FloatFormat("fp6_e3m2", 3, 2, 3),
        FloatFormat("fp4_e2m1", 2, 1, 1),
    )
}
