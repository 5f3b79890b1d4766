"""Quantized weights as other programs read them: integers with a scale for each group, or one plain matrix."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ptq_exp.quantization.online import OnlineLayer, Rotation, Scaling, online_parts, rotated
from ptq_exp.quantization.packed_network import other_state
from ptq_exp.quantization.quantizer.formats import format_of

LEAST_GROUP = 8
"""Input channels that share a scale: of fewer, scales of 32 bits would take as much as the weights in 8 bits."""


class Integers(NamedTuple):
    """A weight [out, in, *kernel] as integers.

    Attributes:
        codes: int32 >= 0, of its shape; the value is (lowest + code) * scale, in float32.
        lowest, scale: float32 [out, groups]; a group is so many neighbouring input channels.
        signed: whether `lowest` + code lies in -2^(bits - 1) .. 2^(bits - 1) - 1 everywhere.
        bits: width of the codes.
        per_tensor: whether all have one scale.
    """

    codes: Tensor
    lowest: Tensor
    scale: Tensor
    signed: bool
    bits: int
    per_tensor: bool

    @property
    def levels(self) -> Tensor:
        """The multiples of the scale, int32 of the shape of the weight."""
        lowest = self.lowest.int().repeat_interleave(self.codes.shape[1] // self.lowest.shape[1], 1)
        return self.codes + lowest.view(*lowest.shape, *[1] * (self.codes.ndim - 2))


@torch.no_grad()
def integers_of(layer: nn.Module) -> Integers | str:
    """Return the frozen weight of a quantized layer as integers, on the CPU, or why it has none.

    Segments of unequal sizes become groups of their greatest common divisor, which repeat scales.
    """
    quantizer = layer.weight_quantizer
    if name := format_of(quantizer):
        return f"its number format {name} is none of integers"
    weight = layer.weight
    segments = quantizer.segments or (weight.shape[1],)
    group = gcd(*segments)
    if group < LEAST_GROUP and len(segments) > 1:
        return f"groups of {group} input channels are fewer than {LEAST_GROUP}"
    repeats = torch.tensor([size // group for size in segments])

    def table(cells: Tensor) -> Tensor:
        return cells.cpu().float().expand(len(weight), -1).repeat_interleave(repeats, 1).contiguous()

    lowest, highest = (quantizer.qmin - quantizer.zero_point).cpu(), (quantizer.qmax - quantizer.zero_point).cpu()
    bound = 1 << quantizer.bits - 1
    signed = bool((lowest >= -bound).all() and (highest < bound).all())
    codes = quantizer.integers(weight).cpu()
    return Integers(codes, table(lowest), table(quantizer.scale), signed, quantizer.bits, quantizer.scale.numel() == 1)


@torch.no_grad()
def plain_weight(layer: nn.Module) -> Tensor:
    """Return the weight that a layer without online parts and branch has to have for the same output.

    float64 [out, in, *kernel], on the CPU. With quantized inputs the output is another one.
    """
    weight = layer.weight.detach().double().cpu()
    if not isinstance(layer, OnlineLayer):
        return weight
    if layer.branch is not None:
        weight = weight + layer.branch.weight_of_product.cpu()
    for part in reversed(layer.online):
        if isinstance(part, Rotation):
            weight = rotated(weight.movedim(1, -1), part.matrix.double().cpu(), -1).movedim(-1, 1)
        elif isinstance(part, Scaling):
            weight = weight * part.factor.double().cpu().view(1, -1, *[1] * (weight.ndim - 2))
        else:
            raise TypeError(f"{type(part).__name__}: no way is known to fold it into a weight")
    return weight.contiguous()


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and persistent buffers but quantized weights, ranges and what transforms added, by name."""
    added = tuple(f"{name}." for name, _ in online_parts(network))
    state = {name: value.detach().cpu().clone() for name, value in other_state(network).items()}
    for name in [name for name in state if name.startswith(added)]:
        del state[name]
    for name, layer in network.named_modules():
        key = f"{name}.weight".lstrip(".")
        if isinstance(layer, OnlineLayer) and key in state:  # its input alone is quantized
            state[key] = plain_weight(layer).to(state[key].dtype)
    return state


def rotation_of(layer: nn.Module) -> int | str | None:
    """Return the size of the blocks in which the input of a layer is turned, channel by channel; None = it is not.

    Where its input goes through something else, return what that is.
    """
    parts = list(layer.online) if isinstance(layer, OnlineLayer) else []
    others = [part.meaning for part in parts if not isinstance(part, Rotation)]
    if others or len(parts) > 1:
        return f"its input goes through {', '.join(others) or 'several rotations'}"
    if parts and layer.weight[0, 0].numel() > 1:
        return f"{parts[0].meaning} of channels before a kernel of {'x'.join(map(str, layer.weight.shape[2:]))}"
    return parts[0].size if parts else None


def model_inside(network: nn.Module) -> tuple[str, nn.Module] | None:
    """Return (prefix of its names, model of diffusers) that holds all parameters of `network`; None = there is none."""
    for name, module in network.named_modules():
        if isinstance(module, ModelMixin):
            prefix = f"{name}." if name else ""
            inside = all(key.startswith(prefix) for key, _ in network.named_parameters())
            return (prefix, module) if inside else None
    return None
