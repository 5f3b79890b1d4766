"""One quantized layer in the layout of the package sdnq: its own integers and scales, nothing is rounded again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq_exp.deploy.integer_weights import Integers, integers_of, plain_weight, rotation_of
from ptq_exp.errors import ConfigError
from ptq_exp.quantization.layers import ordinary_type

MOST_BITS = 8
_PACKED_TOGETHER = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8}
"""Bits -> how many integers sdnq packs together: their number has to be a multiple."""


class SdnqLayer(NamedTuple):
    """A layer for sdnq.

    Attributes:
        settings: that `SDNQConfig` has for it.
        tensors: of the layer, by the names that sdnq gives them.
        distance: of what sdnq's own arithmetic makes of them, relative to the layer's weight.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    distance: float


@torch.no_grad()
def sdnq_layer(layer: nn.Module) -> SdnqLayer | str:
    """Return a quantized layer in the layout of sdnq, or why it has none there."""
    from sdnq.common import dtype_dict
    from sdnq.packed_int import pack_int
    from sdnq.quantizer import sdnq_quantize_layer_weight

    found = _checked(layer)
    if isinstance(found, str):
        return found
    settings = _settings(layer, found)
    # its own function lays out a weight of this size without memory; numbers are filled in
    dequantizer, expected = sdnq_quantize_layer_weight(
        torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="meta"),
        layer_class_name=ordinary_type(layer).__name__, torch_dtype=layer.weight.dtype, **settings,
    )
    kind = dtype_dict[settings["weights_dtype"]]
    codes = (found.codes if kind["is_unsigned"] else found.levels).reshape(dequantizer.quantized_weight_shape)
    packed = pack_int(codes, settings["weights_dtype"]) if kind["is_packed"] else codes.to(kind["torch_dtype"])
    tensors = {"weight": packed, "scale": _spread(found.scale, expected["scale"])}
    if kind["is_unsigned"]:
        tensors["zero_point"] = _spread(found.lowest * found.scale, expected["zero_point"])
    if settings["use_svd"]:
        up, down = layer.branch.up.cpu().flatten(1), layer.branch.first.cpu().flatten(1)
        tensors |= {"svd_up": up.to(layer.weight.dtype), "svd_down": down.to(layer.weight.dtype)}
    _check(tensors, expected)
    wanted = plain_weight(layer)
    made = dequantizer(**tensors, skip_compile=True).double()
    return SdnqLayer(settings, tensors, float((made - wanted).norm() / wanted.norm().clamp(min=1e-30)))


def _checked(layer: nn.Module) -> Integers | str:
    """Return the integers of a layer, or why sdnq could not read them."""
    rotation, branch = rotation_of(layer), getattr(layer, "branch", None)
    if isinstance(rotation, str):
        return rotation
    out, read = len(layer.weight), layer.weight[0].numel()
    if branch is not None and branch.up.shape[1] > min(out, read):
        return f"its {branch.meaning} is larger than its weight of {out} x {read}"
    found = integers_of(layer)
    if isinstance(found, Integers) and found.bits > MOST_BITS:
        return f"its integers have {found.bits} bits"
    return found


def _settings(layer: nn.Module, found: Integers) -> dict[str, Any]:
    """Return what says the layout of a layer."""
    groups, channels = found.scale.shape[1], layer.weight.shape[1]
    bits = MOST_BITS if layer.weight.numel() % _PACKED_TOGETHER.get(found.bits, 1) else found.bits
    rotation, branch = rotation_of(layer), getattr(layer, "branch", None)
    return {
        "weights_dtype": f"int{bits}" if found.signed else f"uint{bits}",
        "group_size": channels // groups if groups > 1 else -1,
        "use_svd": branch is not None, "svd_rank": 32 if branch is None else branch.up.shape[1],
        "use_hadamard": rotation is not None, "hadamard_group_size": 256 if rotation is None else rotation,
    }


def _spread(cells: Tensor, like: Tensor) -> Tensor:
    """Lay [out, groups] out as sdnq does, which has a scale for each tap of a kernel."""
    return cells.view(*cells.shape, *[1] * (like.ndim - 2)).expand(like.shape).contiguous()


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor | None]) -> None:
    """Raise ConfigError if this version of sdnq expects tensors of other names, shapes or types."""
    wanted = {name: (value.shape, value.dtype) for name, value in expected.items() if value is not None}
    if (made := {name: (value.shape, value.dtype) for name, value in tensors.items()}) != wanted:
        raise ConfigError("format=sdnq: the installed version of sdnq lays weights out in another way than 0.2.8: "
                          f"pip install sdnq==0.2.8 ({wanted} in place of {made})")
