"""Version 1 of a saved network's tensors, as earlier versions of this package wrote them: read alone.

* ``<layer>.weight``: uint8, the integers q - qmin of a quantized weight, packed (`ptq_exp.quantization.packing`);
* ``ranges.scale``, float32, and ``ranges.zero_point.<type>``: the ranges of all quantizers, one after the other, each
  ``[rows, segments]``; zero points in the smallest type that holds them, none where they are 0 by symmetry;
  ``ranges.limits``, float32: qmin, then qmax of quantizers whose limits do not follow from width and symmetry;
* ``parameters.<type>``: all other parameters and persistent buffers, one after the other, each in its own type.

The layout, a dictionary for JSON, says which parts they consist of, in order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ptq_exp.errors import DataError
from ptq_exp.quantization.calibrate import quantizers
from ptq_exp.quantization.packed_network import Stored, check_layout, other_state, restore_from_, type_name


def restore_joined_(network: nn.Module, tensors: Mapping[str, Tensor], layout: Mapping) -> None:
    """Fill a network that has the same quantizers, not calibrated, with the tensors of version 1.

    Afterwards all of its parameters are those of the network that was packed, bit for bit.

    Raises:
        DataError: tensors and layout do not fit each other or the network, or a number is impossible.
    """
    parameters = {
        name: {"type": type_name(value), "shape": list(value.shape)} for name, value in other_state(network).items()
    }
    check_layout(network, layout, {"parameters": parameters})
    restore_from_(network, layout, _Joined(tensors, {name for name, _ in quantizers(network)}))


class _Joined(Stored):
    """Takes the parts of joined tensors one after the other.

    Args:
        ranges: names of the quantizers.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ranges: Collection[str]) -> None:
        super().__init__(tensors)
        self.ranges, self.position = ranges, dict.fromkeys(tensors, 0)

    def take(self, name: str, shape: torch.Size | None, kind: str) -> Tensor:
        """Return the next part of the tensor that `name` is part of; all of it if `shape` is None."""
        key = self._key(name, shape, kind)
        if key not in self.left:
            raise DataError(f"the tensor {key} is missing")
        tensor = self.left[key]
        if tensor.ndim != 1 or type_name(tensor) != kind:
            raise DataError(f"the tensor {key} is {type_name(tensor)} {list(tensor.shape)}, expected {kind} [values]")
        start = self.position[key]
        size = len(tensor) if shape is None else math.prod(shape)
        if start + size > len(tensor):
            raise DataError(f"the tensor {key} ends early: expected {start + size} values, found {len(tensor)}")
        self.position[key] = start + size
        part = tensor[start : start + size]
        return part if shape is None else part.view(shape)

    def finish(self) -> None:
        """Raise DataError if something was not taken."""
        for key, tensor in self.left.items():
            if tensor.ndim != 1 or self.position[key] != len(tensor):
                raise DataError(f"the tensor {key} {list(tensor.shape)} holds more than the model has")

    def _key(self, name: str, shape: torch.Size | None, kind: str) -> str:
        owner, _, field = name.rpartition(".")
        if shape is None:
            return name
        if owner not in self.ranges:
            return f"parameters.{kind}"
        return {"scale": "ranges.scale", "zero_point": f"ranges.zero_point.{kind}"}.get(field, "ranges.limits")
