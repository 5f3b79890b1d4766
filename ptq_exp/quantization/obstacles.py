"""Why a layer of a kind that can be quantized is left alone: quantizing its weight would not do what it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.layers import QUANTIZED
from ptq_exp.quantization.offload.mapped import bring_in, folder_of, release

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 16  # values of a weight whose upper halves are in memory beside it


def layer_obstacles(model: nn.Module) -> dict[str, str]:
    """{name: reason} of the convolutions and linear layers of `model` that a quantized weight does not suit."""
    layers = {name: m for name, m in model.named_modules() if type(m) in QUANTIZED and hasattr(m, "weight")}
    found = {name: why for name, layer in layers.items() if (why := _own_obstacle(layer))}
    for name, others in _sharing(model).items():
        if name in layers:
            found.setdefault(name, f"its weight is also that of {', '.join(others)}")
    return found


def check_initialised(model: nn.Module) -> None:
    """Raise QuantizationError if a lazy layer of `model` has no weights yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise QuantizationError(f"{name} is not initialised: run the network once before it is quantized")


def weight_marks(layers: Mapping[str, nn.Module]) -> dict[str, tuple]:
    """For the weight of each layer what tells whether it was replaced, written to or given other values since."""
    marks = {}
    for name, layer in layers.items():
        if isinstance(layer.weight, Tensor):
            in_file = folder_of(layer) is not None
            if in_file:
                bring_in(layer)
            marks[name] = _mark(layer.weight)
            if in_file:
                release(layer)
    return marks


def _own_obstacle(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> str | None:
    """Why a quantizer of the parameter `weight` would not quantize what `layer` multiplies."""
    if "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__:
        return "its forward was replaced by another function"
    weight = layer._parameters.get("weight")
    if weight is None:
        parts = [key for key in (*layer._parameters, *layer._buffers) if key.startswith("weight")]
        return (
            f"its weight is no parameter, but made of {', '.join(parts) or 'something else'} (weight_norm, "
            "spectral_norm and pruning of torch.nn.utils can be removed, which leaves an ordinary layer)"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} of type {weight.dtype} and layout {weight.layout}"
    return None


def _sharing(model: nn.Module) -> dict[str, list[str]]:
    """Return {module: the other modules that hold a parameter or buffer with elements in common with its weight}."""
    by_storage: dict[tuple, list[tuple[str, str, int, int]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.numel():
                storage, start, end = _place(tensor)
                by_storage[storage].append((name, key, start, end))
    found = {}
    for users in by_storage.values():
        for name, key, start, end in users:
            others = {n for n, _, s, e in users if n != name and s < end and start < e}
            if key == "weight" and others:
                found[name] = sorted(others)
    return found


def _place(tensor: Tensor) -> tuple[tuple, int, int]:
    """Return the storage of `tensor`, and from where to where in it, in bytes, its elements lie."""
    if tensor.is_meta:
        return (id(tensor),), 0, 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.device, tensor.untyped_storage().data_ptr()
    return storage, start, start + (last + 1) * tensor.element_size()


def _mark(weight: Tensor) -> tuple:
    if weight.is_meta:
        return (id(weight), weight._version)
    bits = weight.detach().view(_INTEGERS[weight.element_size()]) if not weight.is_complex() else weight.detach()
    size = bits.element_size()
    if bits.is_contiguous() and not (bits.is_complex() or bits.numel() * size % 8 or bits.storage_offset() * size % 8):
        bits = bits.reshape(-1).view(torch.int64)  # several at once
    return (id(weight), weight.data_ptr(), weight._version, *_sums(bits))


def _sums(bits: Tensor) -> tuple[int, int]:
    """Return the sum of integers, and that of the upper halves of those of eight bytes; 0 of others.

    The first runs over: signs that change in an even number of them leave it as it is. The second does not.
    """
    if bits.dtype != torch.int64:
        return int(bits.sum(dtype=torch.int64)), 0
    parts = bits.split(max(1, _AT_ONCE * len(bits) // max(1, bits.numel())))
    return sum(int(part.sum()) for part in parts), sum(int((part >> 32).sum()) for part in parts)
