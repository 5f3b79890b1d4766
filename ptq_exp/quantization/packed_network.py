"""A quantized network as a plain state dict, and back: packed integers under the weights' names, ranges beside them.

* ``<layer>.weight``: uint8, the integers q - qmin of a quantized weight, or its codes in a number format, packed
  (`ptq_exp.quantization.packing`);
* ``<quantizer>.scale``, float32 ``[rows, segments]``, and ``<quantizer>.zero_point`` in the smallest type that holds
  it, left out where it is 0 by symmetry; ``<quantizer>.qmin`` and ``.qmax``, float32, where they do not follow from
  width and symmetry; of a weight in a block format its scales, such as ``<quantizer>.block_scale``;
* every other parameter and persistent buffer under its own name, in its own type and shape.

Whatever reads safetensors finds the weights under the names that the network's own checkpoint has. The layout, a
dictionary for JSON, has the bits and the shape of every packed weight and the signature of every quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization.affine import QRange, check_range, integer_range
from ptq_exp.quantization.calibrate import has_quantized_weight, quantizers
from ptq_exp.quantization.formats import limits
from ptq_exp.quantization.offload.mapped import SMALLEST, bring_in, folder_of, in_file, release
from ptq_exp.quantization.packing import pack, unpack
from ptq_exp.quantization.quantizer import Quantizer
from ptq_exp.quantization.quantizer.formats import format_of
from ptq_exp.storage.finite import bad_values, is_finite

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_FOLLOWS = ("calibrated", "frozen")  # buffers of quantizers that say nothing new once the ranges are there


def packed_state(network: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """Pack all of `network` into tensors on the CPU, by name, and describe their layout.

    Where the weights of `network` lie in files, so do the packed ones.

    Raises:
        QuantizationError: a quantizer is not calibrated, or a weight is not frozen or not on its grid.
    """
    tensors: dict[str, Tensor] = {}
    folder = folder_of(network)
    layout: dict = {"weights": {}, "ranges": {}}
    for name, layer in packed_layers(network):
        bits = layer.weight_quantizer.bits
        if folder is not None:
            bring_in(layer)
        packed = pack(layer.weight_quantizer.integers(layer.weight).cpu().numpy(), bits)
        tensors[name] = _kept(torch.from_numpy(packed.copy()), folder)
        layout["weights"][name] = weight_entry(layer)
        if folder is not None:
            release(layer)
    for name, quantizer in quantizers(network):
        found, layout["ranges"][name] = _pack_ranges(name, quantizer)
        tensors |= {f"{name}.{field}": value for field, value in found.items()}
    # a copy of each: parameters may share their memory, which a file cannot
    tensors |= {name: _kept(value, folder) for name, value in other_state(network).items()}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, layout


def _kept(value: Tensor, folder: Path | None) -> Tensor:
    """Return a copy of `value` on the CPU, in a file in `folder` where there is one and it is large."""
    value = value.detach().cpu()
    large = value.numel() * value.element_size() >= SMALLEST
    return value.clone() if folder is None or not large else in_file(value, folder)


def restore_state_(network: nn.Module, tensors: Mapping[str, Tensor], layout: Mapping) -> None:
    """Fill a network that has the same quantizers, not calibrated, with what `packed_state` took.

    Afterwards all of its parameters are those of the network that was packed, bit for bit.

    Raises:
        DataError: tensors and layout do not fit each other or the network, or a number is impossible.
    """
    check_layout(network, layout)
    restore_from_(network, layout, Stored(tensors))


class Stored:
    """Tensors of a file, each taken once by its name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)

    def take(self, name: str, shape: torch.Size | None, kind: str) -> Tensor:
        """Return the tensor `name` of a type and, unless None, a shape; DataError if it is none of these."""
        if name not in self.left:
            raise DataError(f"the tensor {name} is missing")
        tensor = self.left.pop(name)
        expected = list(tensor.shape) if shape is None else list(shape)
        if type_name(tensor) != kind or list(tensor.shape) != expected:
            raise DataError(
                f"the tensor {name} is {type_name(tensor)} {list(tensor.shape)}, expected {kind} {expected}"
            )
        return tensor

    def finish(self) -> None:
        """Raise DataError if something was not taken."""
        if self.left:
            raise DataError(f"the tensor {min(self.left)} is more than the model has")


def restore_from_(network: nn.Module, layout: Mapping, stored: Stored) -> None:
    """Fill a network, whose layout is this one, with the tensors that `stored` has; see `restore_state_`."""
    for name, quantizer in quantizers(network):
        found = _unpack_ranges(name, quantizer, layout["ranges"][name], stored)
        check_range(name, found)
        quantizer.set_range(found)
        for field in quantizer.scale_names:
            buffer = getattr(quantizer, field)
            buffer.copy_(stored.take(f"{name}.{field}", buffer.shape, type_name(buffer)))
            if not is_finite(buffer):
                raise DataError(f"{name}.{field} holds {bad_values(buffer)}; quantize the model again")
    parameters = dict(network.named_parameters())
    for name, value in other_state(network).items():
        found = stored.take(name, value.shape, type_name(value))
        if not is_finite(found, or_infinite=name not in parameters):  # masks in buffers hold infinity
            raise DataError(f"{name} holds {bad_values(found)}; quantize the model again")
        value.copy_(found)
    for name, layer in packed_layers(network):
        restore_weight_(layer, stored.take(name, None, "uint8"))
    stored.finish()


def restore_weight_(layer: nn.Module, packed: Tensor) -> None:
    """Give a layer the weight whose packed integers these are.

    Raises:
        DataError: they are not as many as the weight has.
    """
    integers = unpack(packed.numpy(), layer.weight_quantizer.bits, layer.weight.numel())
    layer.weight_quantizer.restore(layer.weight, torch.from_numpy(integers).int().view(layer.weight.shape))


def _pack_ranges(name: str, quantizer: Quantizer) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of one quantizer's ranges, by field, and its entry of the layout."""
    if not quantizer.ready:
        raise QuantizationError(f"{name}: not calibrated, it has no range to save; calibrate the model first")
    entry, tensors = signature(quantizer) | {"zero_point": None, "levels": None}, {"scale": quantizer.scale}
    tensors |= {field: getattr(quantizer, field) for field in quantizer.scale_names}
    zero_point = quantizer.zero_point
    if not (quantizer.symmetric and bool((zero_point == 0).all())):
        kind = next((kind for kind in INTEGERS if torch.equal(zero_point.to(kind).float(), zero_point)), torch.float32)
        entry["zero_point"] = type_name(kind)
        tensors["zero_point"] = zero_point.to(kind)
    for levels, ends in known_limits(quantizer).items():
        if torch.equal(ends[0], quantizer.qmin) and torch.equal(ends[1], quantizer.qmax):
            return tensors, entry | {"levels": levels}
    return tensors | {"qmin": quantizer.qmin, "qmax": quantizer.qmax}, entry


def _unpack_ranges(name: str, quantizer: Quantizer, entry: Mapping, stored: Stored) -> QRange:
    shape = quantizer.scale.shape
    scale = stored.take(f"{name}.scale", shape, "float32")
    zero_point = torch.zeros(shape)
    if entry["zero_point"] is not None:
        zero_point = stored.take(f"{name}.zero_point", shape, entry["zero_point"]).float()
    if entry["levels"] is None:
        return QRange(scale, zero_point, *(stored.take(f"{name}.{q}", shape, "float32") for q in ("qmin", "qmax")))
    known = known_limits(quantizer)
    if entry["levels"] not in known:
        raise DataError(f"{name} has the levels {entry['levels']!r}, expected one of {', '.join(known)}")
    return QRange(scale, zero_point, *known[entry["levels"]])


def known_limits(quantizer: Quantizer) -> dict[str, tuple[Tensor, Tensor]]:
    """(qmin, qmax), each like the scale, by name: what `choose_qparams` makes of width and symmetry."""
    rows, like = len(quantizer.scale), torch.ones_like(quantizer.scale)
    if format_of(quantizer):
        return {"format": limits(quantizer.format, like)}
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


def check_layout(network: nn.Module, layout: Mapping, more: Mapping[str, Mapping] = MappingProxyType({})) -> None:
    """Raise DataError unless `layout` is that of `network`; what the ranges themselves decide is left out.

    `more`: further parts of the layout as they have to be.
    """
    expected = {
        "weights": {name: weight_entry(layer) for name, layer in packed_layers(network)},
        "ranges": {name: signature(quantizer) for name, quantizer in quantizers(network)},
        **more,
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


def weight_entry(layer: nn.Module) -> dict:
    """Describe the packed weight of a layer."""
    quantizer = layer.weight_quantizer
    named = {"format": format_of(quantizer)} if format_of(quantizer) else {}
    return {"bits": quantizer.bits, "shape": list(layer.weight.shape), **named}


def signature(quantizer: Quantizer) -> dict:
    """Describe the shape of a quantizer, by which a saved one is recognised."""
    bits, segments = quantizer.bits, quantizer.segments
    return {
        "bits": list(bits) if isinstance(bits, tuple) else bits,
        "symmetric": quantizer.symmetric,
        **({"dynamic": quantizer.share} if hasattr(quantizer, "share") else {}),
        "segments": list(segments) if segments else None,
        "shape": list(quantizer.scale.shape),
        **({"format": format_of(quantizer)} if format_of(quantizer) else {}),
    }


def packed_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name of the weight, layer) of all layers with a quantized weight, in module order."""
    for name, layer in network.named_modules():
        if has_quantized_weight(layer):
            yield f"{name}.weight" if name else "weight", layer


def other_state(network: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer that is neither a packed weight nor a range, in the order of the state."""
    known = {name for name, _ in packed_layers(network)}
    for name, quantizer in quantizers(network):
        known |= {f"{name}.{buffer}" for buffer in (*QRange._fields, *_FOLLOWS, *quantizer.scale_names)}
    return {name: value for name, value in network.state_dict().items() if name not in known}


def type_name(value: Tensor | torch.dtype) -> str:
    """Name a type of tensors, such as "float32"."""
    return str(getattr(value, "dtype", value)).removeprefix("torch.")
