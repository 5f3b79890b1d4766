"""Activations while a block is reconstructed: learned step sizes (Esser et al. 2020), dropped quantization (QDrop)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import ActivationQuantizer
from ptq_exp.reconstruction.randomness import random_mask

SMALLEST_FACTOR = 0.05
"""Of a calibrated step size: keeps a learned one positive, far below what any data would ask for."""


class StepSizes(nn.Module):
    """The step sizes of a block's activations as factors of the calibrated ones; zero points stay as they are.

    In factors one learning rate serves all: step sizes differ by orders of magnitude between a softmax map at 16 bits
    and an input at 4. The gradient is straight-through, see `ptq_exp.quantization.affine.fake_quantize`. With bins of
    sampling steps each row has factors of its own, which the samples that use the row decide; a row that no sample uses
    keeps its calibrated step sizes.

    Attributes:
        factors: parameter float32 [n], 1 at the start; one per range, the quantizers' one after the other.

    Args:
        quantizers: {name: quantizer}, calibrated, of one width each.

    Raises:
        ConfigError: a quantizer has candidate widths.
    """

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        super().__init__()
        for name, quantizer in quantizers.items():
            if len(quantizer.widths) > 1:
                raise ConfigError(
                    f"{quantizer.name or name} has the candidate widths {quantizer.widths}, and reconstruction.step_lr "
                    "learns step sizes of one: set reconstruction.step_lr=0, or one activation width for all steps"
                )
        self.names = [f"{name}.scale" for name in quantizers]
        self.shapes = [quantizer.scale.shape for quantizer in quantizers.values()]
        start = [quantizer.scale.detach().reshape(-1) for quantizer in quantizers.values()]
        self.register_buffer("start", torch.cat(start) if start else torch.empty(0))
        self.factors = nn.Parameter(torch.ones_like(self.start))

    def scales(self) -> dict[str, Tensor]:
        """{"<quantizer>.scale": [rows, segments]}, differentiable."""
        steps = self.start * self.factors.clamp(min=SMALLEST_FACTOR)
        parts = steps.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}


@contextmanager
def dropping(
    quantizers: Mapping[str, ActivationQuantizer], drop_prob: float, generator: torch.Generator
) -> Iterator[None]:
    """Inside, each element that passes one of `quantizers` stays full precision with probability `drop_prob`.

    Wei et al. 2022, "QDrop", equation 8. Outside, and with `drop_prob` 0, every quantizer rounds everything.

    Args:
        generator: of the device that the activations are on.
    """

    def kept(x: Tensor) -> Tensor:
        return random_mask(x, drop_prob, generator)

    for quantizer in quantizers.values():
        quantizer.kept = kept if drop_prob else None
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.kept = None
