"""What a network computes: its multiplications, found by one full-precision forward of one sample.

Every operator that torch runs is seen. The multiply-accumulates of matrix products and convolutions belong to the
innermost layer or attention that runs them, or to none; operators that neither are counted nor are known to multiply
nothing are named, so that nothing is hidden.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.cost.operators import as_layers_do, counted, macs_of, without_products
from ptq_exp.quantization.cost.owners import Owners, place_of
from ptq_exp.quantization.layers import mapped_attention
from ptq_exp.quantization.online import Online, Scaling
from ptq_exp.quantization.trace.evaluate import evaluate, evaluating, tensors_in
from ptq_exp.quantization.trace.products import Multiplier, ProductTrace, product_site


@dataclass
class Trace:
    """Multiply-accumulates of one sample.

    Attributes:
        layer_macs: per convolution and linear layer (subclasses included), summed over its calls.
        attention_macs: per `Attention` that is quantized by its softmax map, of the products (q k^T, softmax(.) v) over
            all heads.
        multipliers: all other modules that multiply activations.
        product_macs: {product: multiply-accumulates} of theirs, see `product_site`.
        total_macs: of all convolutions and matrix products, counted at the level of operators.
        outside_macs: of convolutions and products with a parameter (as `F.linear` computes) outside all layers.
        uncounted: {operator: calls} of those whose multiplications are not known.
        used_outside: layers whose weight something else than their own forward reads.
    """

    layer_macs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    attention_macs: dict[str, tuple[int, int]] = field(default_factory=dict)
    multipliers: dict[str, Multiplier] = field(default_factory=dict)
    product_macs: dict[str, int] = field(default_factory=dict)
    total_macs: int = 0
    outside_macs: int = 0
    uncounted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    used_outside: set[str] = field(default_factory=set)

    @property
    def other_macs(self) -> int:
        """Multiply-accumulates outside convolutions, linear layers and products of activations in known modules."""
        named = sum(self.layer_macs.values()) + sum(sum(pair) for pair in self.attention_macs.values())
        return self.total_macs - named - sum(self.product_macs.values())


def multiplying_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of convolutions and linear layers, subclasses included, and of online parts, in order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear, Online)))


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Yield (name, module) of the `diffusers` attention modules, subclasses included, in module order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Attention))


def trace(model: nn.Module, example_inputs: tuple) -> Trace:
    """Run `model` on `example_inputs` once without gradients, in evaluation mode, and count.

    Args:
        model: the network, in full precision (quantizers off).
        example_inputs: arguments for one sample, see `evaluate`: the first tensor among them is ``[1, ...]``.

    Raises:
        QuantizationError: the example holds more than one sample.
    """
    sizes = [value.shape[0] for value in tensors_in(tuple(example_inputs)) if value.ndim]
    if not sizes or sizes[0] != 1:
        raise QuantizationError(
            f"example_inputs: expected one sample (first dimension 1), found sizes {sizes}"
        )
    layers, attentions = dict(multiplying_layers(model)), dict(attention_modules(model))
    places = {place_of(parameter) for parameter in model.parameters()} - {None}
    census = _Census(Owners(layers, attentions), places)
    plain = {name for name, attention in attentions.items() if mapped_attention(attention)}
    products = ProductTrace(model, layers, plain, census.owners.within)
    with plainly(model), census.owners, products, _recorded(layers) as (shapes, by_shape), census:
        evaluate(model, example_inputs)
    for owner in {owner for owner, _ in census.uncounted} & set(layers):
        census.macs[owner] = max(census.macs[owner], by_shape[owner])  # what it is for, by an unknown operator
    for name, layer in layers.items():
        if isinstance(layer, Scaling):  # no products that are summed, but what a transform adds is counted
            census.macs[name] += by_shape[name]
    result = Trace(total_macs=sum(census.macs.values()), used_outside=census.used_outside)
    result.outside_macs = census.outside_macs
    for (_, operator), calls in census.uncounted.items():
        result.uncounted[operator] += calls
    result.layer_macs |= {name: census.macs[name] for name in layers if census.macs[name]}
    result.multipliers = products.multipliers()
    for name, multiplier in result.multipliers.items():
        result.product_macs |= _product_macs(name, multiplier, census.macs, products.halves)
    for name in (name for name in attentions if name not in result.multipliers):
        prefix = f"{name}." if name else ""
        qk, av = _attention_macs(*(shapes[f"{prefix}to_{operand}"] for operand in "qkv"))
        qk = min(qk, census.macs[name])  # a processor may compute less than the two products of its q, k and v
        result.attention_macs[name] = qk, min(av, census.macs[name] - qk)
    return result


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, list[torch.Size]], dict[str, int]]]:
    """Record the shapes of the outputs of `layers`, by name, and the multiply-accumulates that follow from them."""
    shapes: dict[str, list[torch.Size]] = defaultdict(list)
    macs: dict[str, int] = defaultdict(int)

    def record(layer: nn.Module, args: tuple, kwargs: dict, output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            x = args[0] if args else kwargs["input"]
            macs[name] += layer_macs(layer, x.shape, output.shape)
            shapes[name].append(output.shape)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(
                layer.register_forward_hook(partial(record, name=name), prepend=True, with_kwargs=True)
            )
        yield shapes, macs


def layer_macs(layer: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> int:
    """Multiply-accumulates of one call of a convolution (transposed or not), linear layer or online part."""
    if isinstance(layer, Online):
        return layer.macs(input_shape, output_shape)
    if isinstance(layer, nn.Linear):
        return output_shape.numel() * layer.in_features
    window = prod(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        return input_shape.numel() * layer.out_channels // layer.groups * window
    return output_shape.numel() * layer.in_channels // layer.groups * window


def _product_macs(
    name: str, multiplier: Multiplier, macs: dict[str | None, int], halves: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """{product: multiply-accumulates} of one module; those of a fused function are shared out by its two widths."""
    found = {}
    for call in multiplier.calls:
        names = [product_site(name, key) for key in call.keys]
        if len(names) == 2:
            first, second = halves[names[0]]
            both = macs[names[0]]
            found[names[0]] = both * first // (first + second)
            found[names[1]] = both - found[names[0]]
        elif names:
            found[names[0]] = macs[names[0]]
    return found


class _Census(TorchDispatchMode):
    """Counts the multiply-accumulates of all operators, and names those that it does not know, by their owners."""

    supports_higher_order_operators = True

    def __init__(self, owners: Owners, parameters: Container[int]) -> None:
        super().__init__()
        self.owners, self.parameters = owners, parameters
        self.macs: dict[str | None, int] = defaultdict(int)
        self.uncounted: dict[tuple[str | None, str], int] = defaultdict(int)
        self.used_outside: set[str] = set()
        self.outside_macs = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say no: torch would wrap the method below, so that its first call loads all that compiles; see `plainly`."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(function, torch._ops.OpOverload):
            self.uncounted[self.owners.innermost, str(function)] += 1
            return function(*args, **kwargs)
        if not counted(function):
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        output = function(*args, **kwargs)
        if (owner := self.owners.of(args)) != self.owners.innermost:
            self.used_outside.add(owner)
            if not counted(function):
                self.owners.derive(owner, output)
        if counted(function):
            macs = macs_of(function, args, kwargs, output)
            self.macs[owner] += macs
            if owner not in self.owners.layers and as_layers_do(function, args, self.parameters):
                self.outside_macs += macs
        elif not without_products(function):
            name = f"{function.namespace}.{function.overloadpacket.__name__}"
            self.uncounted[self.owners.innermost, name] += 1
        return output


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Run what is computed one operator at a time: not compiled, nor fused for attention.

    Without gradients, in evaluation mode (dropout would draw random numbers).
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # what compiles takes a second to load, and where it is not, nothing is compiled
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        # The math backend spells the fused attention out, which is counted as one operator of another kind otherwise.
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _attention_macs(q: list[torch.Size], k: list[torch.Size], v: list[torch.Size]) -> tuple[int, int]:
    """Sum over calls of B L_q L_k D and B L_q L_k D_v, from the shapes ``[B, L, D]`` (D: all heads)."""
    calls = list(zip(q, k, v, strict=True)) if len(q) == len(k) == len(v) else []
    qk = sum(a.numel() * b[-2] for a, b, _ in calls)
    av = sum(a[0] * a[-2] * c[-2] * c[-1] for a, _, c in calls)
    return qk, av
