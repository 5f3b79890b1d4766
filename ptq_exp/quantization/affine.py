# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnnecessaryIsInstance=false
"""Uniform affine quantization as pure functions: real value = scale * (integer - zero_point).

The integer grid always holds the zero point, so that zero (padding, ReLU, empty skip) is represented exactly.
Convention and notation follow Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.storage.finite import require_finite

MIN_BITS, MAX_BITS = 2, 16
# Keeps x / scale finite for an all-zero tensor, and lies below every step that a 16-bit softmax map needs.
SCALE_FLOOR = 1e-12
# Activations of fewer elements leave what their gradient needs in memory: 12 bytes an element, 48 MB at most each.
FEW = 1 << 22


class QRange(NamedTuple):
    """Parameters of one affine quantizer; `fake_quantize(x, *qrange)` applies it.

    All four are float32 tensors of one shape that broadcasts against the tensor they belong to: 0-d per
    tensor, or with every dimension but the channel axis kept at size 1. `zero_point`, `qmin` and `qmax` hold
    integers, qmin <= zero_point <= qmax.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor


def check_range(name: str, qrange: QRange) -> None:
    """Raise DataError unless a range that was read for the quantizer `name` is one.

    That is: its numbers are finite, scale > 0, qmin <= zero_point <= qmax.
    """
    require_finite(qrange._asdict(), name, "quantize the model again")
    scale, zero_point, qmin, qmax = qrange
    if not bool((scale > 0).all()):
        raise DataError(f"{name}: scale holds {float(scale.min()):g}, it must be positive; quantize the model again")
    outside = (zero_point < qmin) | (zero_point > qmax)
    if bool(outside.any()):
        worst, low, high = (float(part.expand_as(outside)[outside][0]) for part in (zero_point, qmin, qmax))
        raise DataError(
            f"{name}: zero_point holds {worst:g}, outside its levels {low:g} to {high:g}; quantize the model again"
        )


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of a `bits` wide grid: [-2^(b-1), 2^(b-1)-1] if signed, else [0, 2^b-1].

    Raises ConfigError if `bits` is not an integer from 2 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits={bits!r}: expected an integer from {MIN_BITS} to {MAX_BITS}")
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def choose_qparams(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> QRange:
    """Quantizer whose grid just covers [lo, hi], widened to include zero.

    Asymmetric: unsigned grid, scale = (hi - lo) / (2^b - 1), zero point -lo / scale rounded inside the grid.
    Symmetric: zero point 0; signed grid with the smallest scale that clips neither end, or, where the range
    is one-sided, all 2^b levels on that side: [0, 2^b-1] for lo >= 0, else [-(2^b-1), 0] for hi <= 0.

    Args:
        lo, hi: range ends, any common shape (one element per quantizer); the result has that shape.
        bits: 2 to 16, see `integer_range`.
    """
    unsigned_max = float(integer_range(bits, signed=False)[1])
    lo, hi = (end.to(torch.float32) for end in torch.broadcast_tensors(lo.clamp(max=0), hi.clamp(min=0)))
    if not symmetric:
        scale = ((hi - lo) / unsigned_max).clamp_(min=SCALE_FLOOR)
        zero_point = (-lo / scale).round_().clamp_(0, unsigned_max)
        return QRange(scale, zero_point, torch.zeros_like(scale), torch.full_like(scale, unsigned_max))
    qmin, qmax = symmetric_levels(lo, hi, bits)
    below = torch.where(qmin < 0, lo / qmin.clamp(max=-1), 0)
    above = torch.where(qmax > 0, hi / qmax.clamp(min=1), 0)
    scale = torch.maximum(below, above).clamp_(min=SCALE_FLOOR)
    return QRange(scale, torch.zeros_like(scale), qmin, qmax)


def symmetric_levels(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer range (qmin, qmax) of a symmetric quantizer for data in [lo, hi], shaped like `lo`, float32.

    Signed for two-sided data; one-sided data (all >= 0, or all <= 0) gets all levels on its own side.
    """
    signed_min, signed_max = integer_range(bits, signed=True)
    unsigned_max = integer_range(bits, signed=False)[1]
    positive, negative = lo >= 0, (hi <= 0) & (lo < 0)
    qmin = torch.full_like(lo, signed_min, dtype=torch.float32)
    qmax = torch.full_like(hi, signed_max, dtype=torch.float32)
    qmin = qmin.masked_fill(positive, 0).masked_fill(negative, -unsigned_max)
    qmax = qmax.masked_fill(positive, unsigned_max).masked_fill(negative, 0)
    return qmin, qmax


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Integers (int32) in [qmin, qmax] nearest to x / scale + zero_point; ties go to the even level."""
    level = torch.div(x, scale).round_().clamp_(qmin - zero_point, qmax - zero_point)
    return level.add_(zero_point).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values scale * (q - zero_point) of the integers `q`."""
    return (q - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, kept: Tensor | None = None
) -> Tensor:
    """`dequantize(quantize(x))` in one step, differentiable in `x` and `scale`.

    Backward is the straight-through estimator: inside, d/dx = 1 and d/dscale = level - x / scale; outside,
    d/dx = 0 and d/dscale is the clamped level; levels count from the zero point, which is a constant (Esser et
    al. 2020, "Learned Step Size Quantization", equation 3, without its gradient scale). "Inside" is judged
    after rounding, as in Wei et al. 2022, "QDrop".

    Args:
        x: float32 (or float64) tensor of any shape.
        scale, zero_point, qmin, qmax: see `QRange`.
        kept: 1 where an element stays as it is (QDrop, equation 8), 0 where it is quantized; shape and dtype of `x`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, kept)
    return _fake_quantize_values(x, scale, zero_point, qmin, qmax, kept)


def _fake_quantize_values(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, kept: Tensor | None
) -> Tensor:
    # The zero point only moves the clamp bounds, so one temporary and four passes do.
    values = _clamp_(torch.div(x, scale).round_(), qmin - zero_point, qmax - zero_point).mul_(scale)
    if kept is None:
        return values
    # exact at 0 and 1, and on a CPU several times faster than `where`, as are all masks of numbers below
    return torch.lerp(values, x.to(values.dtype), kept.to(values.dtype))


def _clamp_(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`x.clamp_(lowest, highest)`; on a CPU both of these passes together take less time than that one."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # which knows no `out` that is not contiguous
        return x.clamp_(lowest, highest)
    torch.maximum(x, lowest, out=x)
    return torch.minimum(x, highest, out=x)


class _FakeQuantize(torch.autograd.Function):
    """Values of the inference path with a straight-through backward.

    For it either `x` is kept, or of fewer than `FEW` elements what the values are computed of: the same numbers.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *args
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, kept: Tensor | None
    ) -> Tensor:
        lowest, highest = qmin - zero_point, qmax - zero_point
        if x.numel() >= FEW:
            ctx.save_for_backward(x, scale, lowest, highest, kept)
            return _fake_quantize_values(x, scale, zero_point, qmin, qmax, kept)
        ratio, clamped, inside = _levels(x, scale, lowest, highest)
        values = clamped * scale
        if not ctx.needs_input_grad[1]:
            ratio = clamped = None
        ctx.save_for_backward(None, scale, lowest, highest, kept, ratio, clamped, inside)
        return values if kept is None else torch.lerp(values, x.to(values.dtype), kept.to(values.dtype))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *args
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, scale, lowest, highest, kept, *known = ctx.saved_tensors
        ratio, clamped, inside = known or _levels(x, scale, lowest, highest)
        kept = kept if kept is None else kept.to(inside.dtype)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[1]:
            per_element = torch.addcmul(clamped, ratio, inside, value=-1).mul_(grad)
            if kept is not None:
                per_element.addcmul_(per_element, kept, value=-1)
            grad_scale = per_element.sum_to_size(scale.shape)
        if ctx.needs_input_grad[0]:
            grad_x = (inside if kept is None else torch.maximum(inside, kept)) * grad
        return grad_x, grad_scale, None, None, None, None


def _levels(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / scale, the level of each element, and 1 where it is not clamped to that, else 0."""
    ratio = torch.div(x, scale)
    level = ratio.round()
    clamped = _clamp_(level.clone(), lowest, highest)
    return ratio, clamped, level.eq_(clamped)


def straight_through(
    x: Tensor, found: Tensor, kept: Tensor | None = None, inside: Tensor | None = None
) -> Tensor:
    """Return `found`, the rounded `x`, with the gradient of `x` where it is `inside` (None: everywhere).

    Args:
        kept: as in `fake_quantize`.
    """
    if kept is not None:
        found = torch.lerp(found, x.to(found.dtype), kept.to(found.dtype))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return found
    if inside is not None:
        inside = inside if kept is None else inside | kept.bool()
    return _StraightThrough.apply(x, found, inside)


class _StraightThrough(torch.autograd.Function):
    """Values found elsewhere, with the gradient of what they were found for."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *args
        ctx: Any, x: Tensor, found: Tensor, inside: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inside)
        return found.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *args
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else grad * inside, None, None
