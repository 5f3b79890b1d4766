"""Linear layers of 4-bit weights with a scale per group of input channels, whose inputs the engine quantizes itself.

Nothing multiplies such groups by 8-bit inputs of a fixed range. OpenVINO multiplies them by inputs that it quantizes
while it runs, 8 bits for each group of channels of a row: the weights stay 4 bits in memory, and the range of the input
that was calibrated is not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.quantization.quantizer.formats import format_of

LEVELS = 16
SMALLEST = 32
"""Input channels of a group from which on OpenVINO quantizes inputs itself and gains time by it."""


@dataclass(frozen=True)
class GroupedWeight:
    """A weight as scale * (levels - zero), groups of equal size along the input channels.

    Attributes:
        levels: uint8 [out_channels, groups, size], 0 to 15.
        zero: uint8 [out_channels, groups, 1], 0 to 15.
        scale: float32 [out_channels, groups, 1].
    """

    levels: Tensor
    zero: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        """Input channels of a group."""
        return self.levels.shape[2]


def grouped_weight(layer: nn.Module) -> GroupedWeight | None:
    """Return the weight of a calibrated linear layer; None where it has no equal groups of `SMALLEST` and 4 bits."""
    quantizer = layer.weight_quantizer
    sizes = set(quantizer.segments or ())
    if not isinstance(layer, nn.Linear) or len(sizes) != 1 or min(sizes) < SMALLEST or quantizer.bits > 4:
        return None
    if format_of(quantizer):
        return None
    size = sizes.pop()
    zero = (quantizer.zero_point - quantizer.qmin).unsqueeze(2)
    if size % 2 or not bool(((zero >= 0) & (zero < LEVELS)).all()):
        return None
    levels = quantizer.integers(layer.weight.detach()).to(torch.uint8).unflatten(1, (-1, size))
    groups = (len(levels), levels.shape[1], 1)
    zero, scale = zero.to(torch.uint8).expand(groups), quantizer.scale.unsqueeze(2).expand(groups)
    return GroupedWeight(levels.contiguous(), zero.contiguous(), scale.contiguous())


class GroupedLinear(nn.Module):
    """A linear layer of 4-bit weights in groups, on inputs as they are."""

    def __init__(self, layer: nn.Module, weight: GroupedWeight, output: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = _Product(weight, layer.bias), output

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        return self.output(self.layer(x))


class _Product(nn.Module):
    """Multiplies by a weight in groups; its buffers are what `packed_` makes 4 bits of."""

    def __init__(self, weight: GroupedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach())
        for name in ("levels", "zero", "scale"):
            self.register_buffer(name, getattr(weight, name))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.levels.float() - self.zero.float()) * self.scale
        return nn.functional.linear(x, weight.flatten(1), self.bias)


def group_settings(network: nn.Module) -> dict[str, int]:
    """Return OpenVINO's settings for the grouped layers of a `network`: the size that suits all; none without any."""
    sizes = [module.layer.levels.shape[2] for module in network.modules() if isinstance(module, GroupedLinear)]
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": math.gcd(*sizes)} if sizes else {}


def packed_(model: Any) -> None:
    """Store levels and zeros of weights in groups as 4 bits each, two to a byte, in OpenVINO's traced model."""
    import openvino

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.u8 or node.data.ndim != 3:
            continue
        values = node.data.reshape(-1)
        if values.size % 2:
            values = np.append(values, 0)
        packed = np.ascontiguousarray(values[0::2] | (values[1::2] << 4))
        tensor = openvino.Tensor(packed, list(node.data.shape), openvino.Type.u4)
        made = openvino.op.Constant(tensor, shared_memory=False)
        made.set_friendly_name(node.get_friendly_name())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(made.output(0))
