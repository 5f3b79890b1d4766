"""What a network computes: its multiplications, found by one full-precision forward of one sample.

Convolutions and linear layers are counted from the shapes that pass them, attention products from the q, k
and v that their linear layers return. What remains of the total that `torch.utils.flop_counter` sees at the
level of operators (a matrix product written as a function, say) is reported too, so that nothing is hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from ptq_exp.errors import QuantizationError


@dataclass
class Trace:
    """Multiply-accumulates of one sample.

    Attributes:
        layer_macs: per convolution and linear layer (subclasses included), summed over its calls.
        attention_macs: per `Attention`, of the products (q k^T, softmax(.) v) over all heads.
        total_macs: of all convolutions and matrix products, counted at the level of operators.
    """

    layer_macs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    attention_macs: dict[str, tuple[int, int]] = field(default_factory=dict)
    total_macs: int = 0

    @property
    def other_macs(self) -> int:
        """Multiply-accumulates outside convolutions, linear layers and `Attention` products."""
        named = sum(self.layer_macs.values()) + sum(sum(pair) for pair in self.attention_macs.values())
        return max(0, self.total_macs - named)


def multiplying_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the convolutions and linear layers, subclasses included, in module order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear)))


def trace(model: nn.Module, example_inputs: tuple) -> Trace:
    """Run ``model(*example_inputs)`` once without gradients, in evaluation mode, and count.

    Args:
        model: the network, in full precision (quantizers off).
        example_inputs: positional arguments for one sample: the first tensor among them is ``[1, ...]``.

    Raises:
        QuantizationError: the example holds more than one sample.
    """
    sizes = [value.shape[0] for value in example_inputs if isinstance(value, Tensor) and value.ndim]
    if not sizes or sizes[0] != 1:
        raise QuantizationError(
            f"example_inputs: expected one sample (first dimension 1), found sizes {sizes}"
        )
    shapes: dict[str, list[torch.Size]] = defaultdict(list)
    result = Trace()

    def record(name: str, layer: nn.Module):
        def hook(_, args: tuple, kwargs: dict, output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            result.layer_macs[name] += layer_macs(layer, x.shape, output.shape)
            shapes[name].append(output.shape)

        return layer.register_forward_hook(hook, with_kwargs=True)

    handles = [record(name, layer) for name, layer in multiplying_layers(model)]
    try:
        # The math backend spells the fused attention out, which the counter does not know on every device.
        with _evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    result.total_macs = counter.get_total_flops() // 2
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            prefix = f"{name}." if name else ""
            result.attention_macs[name] = _attention_macs(
                *(shapes[f"{prefix}to_{operand}"] for operand in "qkv")
            )
    return result


def layer_macs(layer: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> int:
    """Multiply-accumulates of one call of a convolution (transposed or not) or linear layer, without bias."""
    if isinstance(layer, nn.Linear):
        return output_shape.numel() * layer.in_features
    window = prod(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        return input_shape.numel() * layer.out_channels // layer.groups * window
    return output_shape.numel() * layer.in_channels // layer.groups * window


def _attention_macs(q: list[torch.Size], k: list[torch.Size], v: list[torch.Size]) -> tuple[int, int]:
    """Sum over calls of B L_q L_k D and B L_q L_k D_v, from the shapes ``[B, L, D]`` (D: all heads)."""
    calls = list(zip(q, k, v, strict=True)) if len(q) == len(k) == len(v) else []
    qk = sum(a.numel() * b[-2] for a, b, _ in calls)
    av = sum(a[0] * a[-2] * c[-2] * c[-1] for a, _, c in calls)
    return qk, av


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode (dropout would draw random numbers), then restore each one's own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
