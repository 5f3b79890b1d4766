"""From values to the output of attention: channels of a head that can be turned between the two, at no cost.

out = W_o concat_h(A_h v_h): attention mixes tokens, not the channels of a head, so that v may be turned in every head
if W_o is turned back (QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.quantization.online import rotated

_WRITERS, _READERS = ("to_v", "add_v_proj"), ("to_out.0", "to_add_out")
"""Layers of the attention modules of diffusers that make values, and that read the outputs of all heads."""


@dataclass(frozen=True)
class ValuePath:
    """The layers of one attention module between which channels of heads can be turned.

    Attributes:
        writers, readers: names of those that make values, and that read what attention makes of them.
        width: channels of a head.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them, writers first."""
        return (*self.writers, *self.readers)


def value_paths(network: nn.Module, allowed: Collection[str]) -> dict[str, ValuePath]:
    """Return {attention module: its path} of all modules whose layers on the path are linear and in `allowed`."""
    found = {}
    for name, module in network.named_modules():
        heads = getattr(module, "heads", None)
        layers = dict(module.named_modules())
        writers = [own for own in _WRITERS if layers.get(own) is not None]
        readers = [own for own in _READERS if layers.get(own) is not None]
        if type(heads) is not int or not writers or not readers:
            continue
        linear = all(isinstance(layers[own], nn.Linear) and f"{name}.{own}" in allowed for own in (*writers, *readers))
        if not linear:
            continue
        widths = {*(layers[own].out_features for own in writers), *(layers[own].in_features for own in readers)}
        if len(widths) == 1 and (width := widths.pop()) % heads == 0:
            of_module = (tuple(f"{name}.{own}" for own in part) for part in (writers, readers))
            found[name] = ValuePath(*of_module, width=width // heads)
    return found


@torch.no_grad()
def turn_(layers: Mapping[str, nn.Module], matrix: Tensor) -> None:
    """Turn blocks of the channels that writers make and readers read by `matrix`, its own inverse, in double precision.

    Args:
        layers: {name: layer} of a `ValuePath`.
    """
    for name, layer in layers.items():
        if name.endswith(_READERS):
            layer.weight.copy_(rotated(layer.weight.double(), matrix, -1))
            continue
        layer.weight.copy_(rotated(layer.weight.double().T, matrix, -1).T)
        if layer.bias is not None:
            layer.bias.copy_(rotated(layer.bias.double(), matrix, -1))
