"""AdaRound: whether each weight is rounded up or down is learned (Nagel et al. 2020, "Up or Down?").

A weight w on a grid of step s becomes w(V) = s clamp(floor(w / s) + h(V), lowest, highest) with the rectified sigmoid
h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) (equations 22 and 23; levels count from the zero point). A regulariser pulls h
to 0 or 1 (equation 24). In the end V >= 0 rounds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import QRange, WeightQuantizer
from ptq_exp.quantization.quantizer.formats import format_of

STRETCH, SHIFT = 1.2, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1], any shape; exactly 0 below V = -2.4 and exactly 1 above 2.4."""
    return torch.sigmoid(v).mul(STRETCH).add(SHIFT).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Return the V of which `rectified_sigmoid` is `h`, in [0, 1]."""
    return -torch.log(STRETCH / (h - SHIFT) - 1)


def regulariser(h: Tensor, b: float) -> Tensor:
    """sum(1 - |2 h - 1|^b) over all elements, 0-d: 0 where every h is 0 or 1 (equation 24)."""
    return h.numel() - h.mul(2).sub(1).abs().pow(b).sum()


@dataclass(frozen=True)
class Annealing:
    """How strongly, and how sharply, the regulariser pulls over `iterations` (counted from 1).

    Attributes:
        iterations: of one block.
        weight: factor of the regulariser beside the reconstruction loss; 0 = none.
        warmup: share of the iterations before it sets in, 0 or more and less than 1.
        start, end: exponent b, which falls linearly after the warm-up: from flat to steep around h = 1/2.
    """

    iterations: int
    weight: float = 0.01
    warmup: float = 0.2
    start: float = 20.0
    end: float = 2.0

    def b(self, t: float) -> float:
        """Exponent at iteration `t`."""
        begins = self.warmup * self.iterations
        if t < begins:
            return self.start
        return self.end + (self.start - self.end) * max(0.0, 1 - (t - begins) / (self.iterations - begins))

    def penalty(self, h: Tensor, t: int) -> Tensor:
        """Return the weighted regulariser at iteration `t`, 0-d; 0 during the warm-up."""
        if self.weight == 0 or t < self.warmup * self.iterations:
            return h.new_zeros(())
        return self.weight * regulariser(h, self.b(t))


def reconstruction_loss(prediction: Tensor, target: Tensor, power: float = 2.0) -> Tensor:
    """|error|^power summed over dimension 1 and averaged over the others, 0-d."""
    error = (prediction - target).float()  # sums of bfloat16 lose what is small
    powers = error.square() if power == 2 else error.abs().pow(power)
    return powers.sum(1).mean()


class Rounding(nn.Module):
    """The rounding of all weights of a block, as one flat vector `v` so that an iteration has few, large operations.

    Attributes:
        v: parameter float32 [n], the rounding variables of all weights one after the other.

    Args:
        weights: full-precision weights of any shapes.
        quantizers: theirs, with ranges; per channel, per tensor or with segments. Ranges are not changed.
    """

    scale: Tensor

    def __init__(self, weights: Sequence[Tensor], quantizers: Sequence[WeightQuantizer]) -> None:
        super().__init__()
        self.shapes = [weight.shape for weight in weights]
        self.dtypes = [weight.dtype for weight in weights]
        self.sizes = [weight.numel() for weight in weights]
        scale, ratio, lowest, highest = (
            torch.cat(parts) for parts in zip(*map(_flat_grid, weights, quantizers), strict=True)
        )
        floor = ratio.floor()
        self.v = nn.Parameter(inverse_rectified_sigmoid(ratio - floor))
        # What floor + h is clamped to can only matter where one of both ends lies outside the range: there h is void.
        free = (floor >= lowest) & (floor < highest)
        base = torch.minimum(torch.maximum(floor, lowest), highest)
        self.register_buffer("base", base)
        self.register_buffer("scale", scale)
        self.register_buffer("free", free.to(scale.dtype))
        self.register_buffer("offset", base * scale)
        self.register_buffer("gain", scale * self.free)

    def h(self) -> Tensor:
        """How far each weight is rounded up, [n] in [0, 1]."""
        return rectified_sigmoid(self.v)

    def soft(self, h: Tensor) -> list[Tensor]:
        """Return the weights, in their shapes, of the relaxed rounding `h` [n]; differentiable."""
        return self._split(torch.addcmul(self.offset, h, self.gain))

    @torch.no_grad()
    def hard(self) -> list[Tensor]:
        """Return the weights, in their shapes, rounded up where V >= 0: exactly scale times an integer."""
        # a weight of float64 is a multiple of its scale to the digits of that type
        kind = torch.float64 if torch.float64 in self.dtypes else torch.float32
        return self._split((self.base + (self.v >= 0) * self.free).to(kind) * self.scale)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split(self.sizes), self.shapes, self.dtypes, strict=True)
        return [part.view(shape).to(dtype) for part, shape, dtype in parts]


def _flat_grid(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, weight / scale, lowest and highest level (from the zero point) of every element, each [n] float32.

    Raises:
        QuantizationError: the quantizer has a number format.
    """
    if made := format_of(quantizer):
        layer = quantizer.name.removesuffix(".weight_quantizer")
        raise QuantizationError(
            f"{layer} is quantized to the number format {made}, and roundings are learned of integers: set "
            "reconstruction=gptq or none, or choose a width such as 4"
        )
    weight = weight.detach().float()
    cells = QRange(*(cell.expand(weight.shape).reshape(-1) for cell in quantizer.cells(weight)))
    ratio = torch.div(weight.reshape(-1), cells.scale)
    return cells.scale.clone(), ratio, cells.qmin - cells.zero_point, cells.qmax - cells.zero_point
