"""A quantized network as few, small tensors, and back: integers of the weights, ranges, and what stays FP.

* ``<layer>.weight``: uint8, the integers q - qmin of a quantized weight, packed (`ptq_exp.quantization.packing`);
* ``ranges.scale``, float32, and ``ranges.zero_point.<type>``: the ranges of all quantizers, one after the other, each
  ``[rows, segments]``; zero points in the smallest type that holds them, none where they are 0 by symmetry;
  ``ranges.limits``, float32: qmin, then qmax of quantizers whose limits do not follow from width and symmetry;
* ``parameters.<type>``: all other parameters and persistent buffers, one after the other, each in its own type.

Small tensors are joined because the name of each costs about a hundred bytes, several per cent of a small network. The
layout, a dictionary for JSON, says which parts they consist of, in order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization.affine import QRange, check_range, integer_range
from ptq_exp.quantization.calibrate import quantizers
from ptq_exp.quantization.packing import pack, unpack
from ptq_exp.quantization.quantizer import Quantizer, WeightQuantizer
from ptq_exp.storage.finite import bad_values, is_finite

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_FOLLOWS = ("calibrated", "frozen")  # buffers of quantizers that say nothing new once the ranges are there


def packed_tensors(network: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) that hold all of `network`, and their layout.

    Raises:
        QuantizationError: a quantizer is not calibrated, or a weight is not frozen or not on its grid.
    """
    tensors: dict[str, Tensor] = {}
    layout: dict = {"weights": {}, "ranges": {}, "parameters": {}}
    joined: dict[str, list[Tensor]] = defaultdict(list)
    for name, layer in _packed_layers(network):
        bits = layer.weight_quantizer.bits
        packed = pack(layer.weight_quantizer.integers(layer.weight).cpu().numpy(), bits)
        tensors[name] = torch.from_numpy(packed.copy())
        layout["weights"][name] = {"bits": bits, "shape": list(layer.weight.shape)}
    for name, quantizer in quantizers(network):
        layout["ranges"][name] = _pack_ranges(name, quantizer, joined)
    for name, value in _other_state(network).items():
        layout["parameters"][name] = {"type": _type_name(value), "shape": list(value.shape)}
        joined[f"parameters.{_type_name(value)}"].append(value)
    for key, parts in joined.items():
        tensors[key] = torch.cat([part.detach().cpu().reshape(-1) for part in parts])
    return tensors, layout


def restore_tensors_(network: nn.Module, tensors: Mapping[str, Tensor], layout: Mapping) -> None:
    """Fill a network that has the same quantizers, not calibrated, with what `packed_tensors` took.

    Afterwards all of its parameters are those of the network that was packed, bit for bit.

    Raises:
        DataError: tensors and layout do not fit each other or the network, or a number is impossible.
    """
    _check_layout(network, layout)
    reader = _Reader(tensors)
    for name, quantizer in quantizers(network):
        found = _unpack_ranges(name, quantizer, layout["ranges"][name], reader)
        check_range(name, found)
        quantizer.set_range(found)
    parameters = dict(network.named_parameters())
    for name, value in _other_state(network).items():
        found = reader.next(f"parameters.{_type_name(value)}", value.shape, _type_name(value))
        if not is_finite(found, or_infinite=name not in parameters):  # masks in buffers hold infinity
            raise DataError(f"{name} holds {bad_values(found)}; quantize the model again")
        value.copy_(found)
    for name, layer in _packed_layers(network):
        packed = reader.next(name, None, "uint8")
        integers = unpack(packed.numpy(), layer.weight_quantizer.bits, layer.weight.numel())
        layer.weight_quantizer.restore(layer.weight, torch.from_numpy(integers).int().view(layer.weight.shape))
    reader.finish()


class _Reader:
    """Takes the parts of joined tensors one after the other."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.position = tensors, dict.fromkeys(tensors, 0)

    def next(self, key: str, shape: tuple[int, ...] | None, kind: str) -> Tensor:
        """The next part of the tensor `key` of type `kind`, of `shape`; all of it if None."""
        if key not in self.tensors:
            raise DataError(f"the tensor {key} is missing")
        tensor = self.tensors[key]
        if tensor.ndim != 1 or _type_name(tensor) != kind:
            raise DataError(f"the tensor {key} is {_type_name(tensor)} {list(tensor.shape)}, expected {kind} [values]")
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


def _pack_ranges(name: str, quantizer: Quantizer, joined: dict[str, list[Tensor]]) -> dict:
    """Append the ranges of one quantizer to the joined tensors; returns its entry of the layout."""
    if not quantizer.ready:
        raise QuantizationError(f"{name}: not calibrated, it has no range to save; calibrate the model first")
    entry = _signature(quantizer) | {"zero_point": None, "levels": None}
    joined["ranges.scale"].append(quantizer.scale)
    zero_point = quantizer.zero_point
    if not (quantizer.symmetric and bool((zero_point == 0).all())):
        kind = next((kind for kind in INTEGERS if torch.equal(zero_point.to(kind).float(), zero_point)), torch.float32)
        entry["zero_point"] = _type_name(kind)
        joined[f"ranges.zero_point.{entry['zero_point']}"].append(zero_point.to(kind))
    for levels, limits in _known_limits(quantizer).items():
        if torch.equal(limits[0], quantizer.qmin) and torch.equal(limits[1], quantizer.qmax):
            entry["levels"] = levels
            return entry
    joined["ranges.limits"] += [quantizer.qmin, quantizer.qmax]
    return entry


def _unpack_ranges(name: str, quantizer: Quantizer, entry: Mapping, reader: _Reader) -> QRange:
    shape = quantizer.scale.shape
    scale = reader.next("ranges.scale", shape, "float32")
    zero_point = torch.zeros(shape)
    if entry["zero_point"] is not None:
        kind = entry["zero_point"]
        zero_point = reader.next(f"ranges.zero_point.{kind}", shape, kind).float()
    if entry["levels"] is None:
        return QRange(scale, zero_point, *(reader.next("ranges.limits", shape, "float32") for _ in range(2)))
    limits = _known_limits(quantizer)
    if entry["levels"] not in limits:
        raise DataError(f"{name} has the levels {entry['levels']!r}, expected one of {', '.join(limits)}")
    return QRange(scale, zero_point, *limits[entry["levels"]])


def _known_limits(quantizer: Quantizer) -> dict[str, tuple[Tensor, Tensor]]:
    """(qmin, qmax), each like the scale, by name: what `choose_qparams` makes of width and symmetry."""
    rows, like = len(quantizer.scale), torch.ones_like(quantizer.scale)
    widths = quantizer.bits if isinstance(quantizer.bits, tuple) else (quantizer.bits,)
    widths = widths if len(widths) == rows else widths[:1] * rows

    def cells(limits: list[int]) -> Tensor:
        return torch.tensor(limits, dtype=like.dtype, device=like.device).view(-1, 1) * like

    top = [integer_range(bits, signed=False)[1] for bits in widths]
    found = {"unsigned": (0 * like, cells(top))}
    if quantizer.symmetric:
        low, high = zip(*(integer_range(bits, signed=True) for bits in widths), strict=True)
        found["signed"] = cells(list(low)), cells(list(high))
        found["negative"] = -cells(top), 0 * like
    return found


def _check_layout(network: nn.Module, layout: Mapping) -> None:
    """Raise DataError unless `layout` is that of `network`; what the ranges themselves decide is left out."""
    parameters = _other_state(network).items()
    expected = {
        "weights": {
            name: {"bits": layer.weight_quantizer.bits, "shape": list(layer.weight.shape)}
            for name, layer in _packed_layers(network)
        },
        "ranges": {name: _signature(quantizer) for name, quantizer in quantizers(network)},
        "parameters": {name: {"type": _type_name(v), "shape": list(v.shape)} for name, v in parameters},
    }
    for kind, wanted in expected.items():
        found = layout[kind]
        for name in wanted.keys() ^ found.keys():
            where = "the model has and the file lacks" if name in wanted else "the file has and the model lacks"
            raise DataError(f"of another network or other rules: {where} {name} ({kind})")
        for name, entry in wanted.items():
            for key, value in entry.items():
                if found[name][key] != value:
                    raise DataError(
                        f"of another network or other rules: {name} has {key} {found[name][key]}, the model {value}"
                    )


def _signature(quantizer: Quantizer) -> dict:
    bits, segments = quantizer.bits, quantizer.segments
    return {
        "bits": list(bits) if isinstance(bits, tuple) else bits,
        "symmetric": quantizer.symmetric,
        "segments": list(segments) if segments else None,
        "shape": list(quantizer.scale.shape),
    }


def _packed_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name of the weight, layer) of all layers with a quantized weight, in module order."""
    for name, layer in network.named_modules():
        if isinstance(getattr(layer, "weight_quantizer", None), WeightQuantizer):
            yield f"{name}.weight" if name else "weight", layer


def _other_state(network: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer that is neither a packed weight nor a range, in the order of the state."""
    known = {name for name, _ in _packed_layers(network)}
    for name, _ in quantizers(network):
        known |= {f"{name}.{buffer}" for buffer in (*QRange._fields, *_FOLLOWS)}
    return {name: value for name, value in network.state_dict().items() if name not in known}


def _type_name(value: Tensor | torch.dtype) -> str:
    return str(getattr(value, "dtype", value)).removeprefix("torch.")
