"""Quantized layers in place of those that multiply: convolutions, linear layers and `diffusers` attention.

A layer is quantized by giving it quantizers as child modules and changing its class to a subclass of its own.
The names of the full-precision parameters, `isinstance`, `pickle` and `deepcopy` go on working, and with all
quantizers off the outputs are those of the full-precision layer bit for bit.
"""

from __future__ import annotations

import math

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.online import (
    ORDINARY,
    ChangedLayer,
    OnlineConv1d,
    OnlineConv2d,
    OnlineLayer,
    OnlineLinear,
)
from ptq_exp.quantization.quantizer.formats import activation_quantizer, weight_quantizer
from ptq_exp.quantization.specs import QuantSpec, TensorSpec


class QuantLayer(ChangedLayer):
    """What all quantized layers have in common."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the quantized input by the quantized weight, and quantize the output."""
        return self.output_quantizer(self.product(input))


class QuantConvolution(QuantLayer):
    """What quantized convolutions have in common."""

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, before the output is quantized; the input is padded after its quantization."""
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantConv1d(QuantConvolution, nn.Conv1d):
    """`nn.Conv1d` ``[B, C_in, L] -> [B, C_out, L']`` on quantized operands."""


class QuantConv2d(QuantConvolution, nn.Conv2d):
    """`nn.Conv2d` ``[B, C_in, H, W] -> [B, C_out, H', W']`` on quantized operands."""


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` ``[..., C_in] -> [..., C_out]`` on quantized operands."""

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, before the output is quantized."""
        return nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantOnline(OnlineLayer):
    """What quantized layers with online parts have in common: the branch reads what is not quantized yet."""

    def forward(self, input: Tensor) -> Tensor:
        """As the quantized layer, on the input that `online` returns, with the branch before outputs are quantized."""
        x = self.online(input)
        y = self.product(x)
        return self.output_quantizer(y if self.branch is None else y + self.branch(x))


class QuantOnlineConv1d(QuantOnline, QuantConv1d):
    """`QuantConv1d` with online parts."""


class QuantOnlineConv2d(QuantOnline, QuantConv2d):
    """`QuantConv2d` with online parts."""


class QuantOnlineLinear(QuantOnline, QuantLinear):
    """`QuantLinear` with online parts."""


class QuantAttention(Attention):
    """`diffusers` attention whose softmax map is quantized.

    Its q, k and v are the outputs of `to_q`, `to_k` and `to_v`, quantized there. It needs the explicit
    `AttnProcessor`: the fused `scaled_dot_product_attention` never shows the map.
    """

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the quantized softmax map ``[B * heads, L_q, L_k]``, values in [0, 1]."""
        return self.softmax_quantizer(super().get_attention_scores(query, key, attention_mask))


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    OnlineConv1d: QuantOnlineConv1d,
    OnlineConv2d: QuantOnlineConv2d,
    OnlineLinear: QuantOnlineLinear,
    Attention: QuantAttention,
}
FULL_PRECISION = {quantized: original for original, quantized in QUANTIZED.items()}


def ordinary_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer before anything was done to it."""
    kind = FULL_PRECISION.get(type(module), type(module))
    return ORDINARY.get(kind, kind)


def retype_(module: nn.Module, quantizers: dict[str, nn.Module]) -> None:
    """Turn `module` into the quantized layer of its type, in place, with `quantizers` (role -> module) as children.

    Assigning ``__class__`` looks like a trick; it is confined to this function. A wrapper around the module
    would rename its parameters (full-precision checkpoints would not load), hide it from `isinstance` and
    from code that reads ``module.weight`` (as `diffusers` does), and a copy would break references held by
    others. That layer is a subclass with the same ``__init__`` and instance layout, so the assignment is well
    defined.
    """
    device = next(module.parameters()).device
    for role, quantizer in quantizers.items():
        setattr(module, role, quantizer.to(device))
    module.__class__ = QUANTIZED[type(module)]


def restore_type_(module: nn.Module) -> None:
    """Undo `retype_`, before anything is calibrated."""
    module.__class__ = FULL_PRECISION[type(module)]
    for name in [name for name, _ in module.named_children()]:
        if name.endswith("_quantizer"):
            delattr(module, name)


def layer_quantizers(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear, spec: QuantSpec, name: str
) -> dict[str, nn.Module]:
    """Return the weight, input and output quantizers that `spec` asks for on `layer` (None = the identity).

    Raises:
        QuantizationError: the segments of `spec` do not add up to the channels of `layer`.
    """
    out_channels, in_channels = layer.weight.shape[:2]
    axis = 1 - layer.weight.ndim  # channels of [..., C], [..., C, L] and [..., C, H, W], and of the weight
    groups = getattr(layer, "groups", 1)
    return {
        "weight_quantizer": _build(
            spec.weight, in_channels, axis, f"{name}.weight_quantizer", tuple(layer.weight.shape)
        ),
        "input_quantizer": _build(
            spec.input, in_channels * groups, axis, f"{name}.input_quantizer", linear=isinstance(layer, nn.Linear)
        ),
        "output_quantizer": _build(spec.output, out_channels, axis, f"{name}.output_quantizer"),
    }


def attention_quantizers(spec: QuantSpec, name: str) -> dict[str, nn.Module]:
    """Return the quantizer of the softmax map that `spec` asks for (it must not be None there)."""
    role = "softmax_quantizer"
    return {role: activation_quantizer(spec.softmax, name=f"{name}.{role}", non_negative=True)}


def attention_obstacle(attention: Attention) -> str | None:
    """Return why the explicit attention path would not compute what `attention` does; None if it would."""
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {type(attention.processor).__name__}, not AttnProcessor or AttnProcessor2_0"
    if attention.norm_q is not None or attention.norm_k is not None:
        return "it normalises q or k, which AttnProcessor does not"
    if attention.to_k is None or attention.fused_projections or attention.inner_kv_dim != attention.inner_dim:
        return "it has no separate to_q, to_k and to_v of equal width"
    default_scale = (attention.inner_dim // attention.heads) ** -0.5
    if type(attention.processor) is AttnProcessor2_0 and not math.isclose(attention.scale, default_scale):
        return f"its scale {attention.scale} is not the {default_scale} that AttnProcessor2_0 applies"
    return None


def mapped_attention(attention: nn.Module) -> bool:
    """Whether `attention` is, or can be made, a `QuantAttention`."""
    return type(attention) in (Attention, QuantAttention) and attention_obstacle(attention) is None


def bits_of(quantizer: nn.Module | None) -> int | tuple[int, ...] | None:
    """Return the bit-width of a quantizer, or its candidates; None for a missing one or the identity in its place."""
    return getattr(quantizer, "bits", None)


def _build(
    spec: TensorSpec | None, channels: int, axis: int, name: str, weight: tuple[int, ...] | None = None, *,
    linear: bool = False,
) -> nn.Module:
    """Build one quantizer.

    Args:
        channels: length of the channel axis.
        weight: shape of the weight; None = of an activation.
        linear: what a linear layer reads, whose positions may have ranges of their own.
    """
    if spec is None:
        return nn.Identity()
    segments = spec.granularity.segments(channels)
    if segments and sum(segments) != channels:
        raise QuantizationError(
            f"{name}: segments {segments} sum to {sum(segments)}, but there are {channels} channels"
        )
    if weight is None:  # an activation's rows follow from its widths or bins
        return activation_quantizer(spec, axis=axis, name=name, segments=segments, linear=linear)
    return weight_quantizer(
        spec.bits, weight, rows=spec.granularity.rows(weight[0]), symmetric=spec.symmetric, segments=segments,
        metric=spec.metric, axis=axis, name=name,
    )
