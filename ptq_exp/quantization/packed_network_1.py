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
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq_exp.errors import DataError
from ptq_exp.quantization.affine import QRange, check_range
from ptq_exp.quantization.calibrate import quantizers
from ptq_exp.quantization.packed_network import (
    check_finite,
    check_layout,
    known_limits,
    other_state,
    packed_layers,
    restore_weight_,
    type_name,
)
from ptq_exp.quantization.quantizer import Quantizer


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
    reader = _Reader(tensors)
    for name, quantizer in quantizers(network):
        found = _unpack_ranges(name, quantizer, layout["ranges"][name], reader)
        check_range(name, found)
        quantizer.set_range(found)
    for name, value in other_state(network).items():
        found = reader.next(f"parameters.{type_name(value)}", value.shape, type_name(value))
        check_finite(network, name, found)
        value.copy_(found)
    for name, layer in packed_layers(network):
        restore_weight_(layer, reader.next(name, None, "uint8"))
    reader.finish()


class _Reader:
    """Takes the parts of joined tensors one after the other."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.position = tensors, dict.fromkeys(tensors, 0)

    def next(self, key: str, shape: tuple[int, ...] | None, kind: str) -> Tensor:
        """Return the next part of the tensor `key` of type `kind`, of `shape`; all of it if None."""
        if key not in self.tensors:
            raise DataError(f"the tensor {key} is missing")
        tensor = self.tensors[key]
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
        """Raise DataError if something was not read."""
        for key, tensor in self.tensors.items():
            if tensor.ndim != 1 or self.position[key] != len(tensor):
                raise DataError(f"the tensor {key} {list(tensor.shape)} holds more than the model has")


def _unpack_ranges(name: str, quantizer: Quantizer, entry: Mapping, reader: _Reader) -> QRange:
    shape = quantizer.scale.shape
    scale = reader.next("ranges.scale", shape, "float32")
    zero_point = torch.zeros(shape)
    if entry["zero_point"] is not None:
        kind = entry["zero_point"]
        zero_point = reader.next(f"ranges.zero_point.{kind}", shape, kind).float()
    if entry["levels"] is None:
        return QRange(scale, zero_point, *(reader.next("ranges.limits", shape, "float32") for _ in range(2)))
    limits = known_limits(quantizer)
    if entry["levels"] not in limits:
        raise DataError(f"{name} has the levels {entry['levels']!r}, expected one of {', '.join(limits)}")
    return QRange(scale, zero_point, *limits[entry["levels"]])
