"""Products of two activations on quantized operands, in any module that multiplies them.

A module that calls `F.scaled_dot_product_attention`, `torch.matmul` and the like on activations is given a quantizer
for each operand of each product, and its class is changed to a subclass whose forward looks out for these calls. With
all of them off it is the forward of the full-precision class, bit for bit. A call is recognised by its place in their
order, as it was seen when the quantizers were placed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.quantizer import Mode
from ptq_exp.quantization.quantizer.formats import activation_quantizer
from ptq_exp.quantization.specs import QuantSpec
from ptq_exp.quantization.trace.products import (
    ATTENTION,
    MATRICES,
    Multiplier,
    ProductCall,
    kind_of,
    places_of_factors,
    plain_arguments,
    product_site,
)


class QuantizedProduct(nn.Module):
    """The quantizers of both operands of one product: of q and k, of softmax map and v, or of two matrices."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left_quantizer, self.right_quantizer = left, right

    def forward(self, left: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return what `multiply` makes of the two quantized operands."""
        return multiply(self.left_quantizer(left), self.right_quantizer(right))

    @property
    def active(self) -> bool:
        """Whether a quantizer is on, or something else than it wants to see what passes it."""
        return any(_active(quantizer) for quantizer in (self.left_quantizer, self.right_quantizer))


class QuantMultiplier(nn.Module):
    """What the subclasses made by `multiplier_class` have in common.

    Attributes:
        products: {name: quantizers} of the products.
        product_calls: the calls that are expected in each forward.
        product_owner: name of the module.
    """

    products: nn.ModuleDict
    product_calls: tuple[ProductCall, ...]
    product_owner: str

    def __reduce_ex__(self, _: Any) -> tuple:
        """Pickle by the full-precision class: this one is made where it is needed."""
        return _blank, (full_precision_class(type(self)),), self.__dict__


@functools.cache
def multiplier_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a class of modules whose forward multiplies quantized operands."""
    original_forward = original.forward  # torch.compile takes some classes of diffusers as they are, not their methods

    @torch.compiler.disable
    def untraced(self, *args: Any, **kwargs: Any) -> Any:
        with _Interception(self):
            return original_forward(self, *args, **kwargs)

    @functools.wraps(original.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not any(product.active for product in self.products.values()):
            return original_forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling():  # nor is what runs inside: the calls of a graph would be looked at again
            return untraced(self, *args, **kwargs)
        with _Unbroken(), _Interception(self):
            return original_forward(self, *args, **kwargs)

    # the class comes first: what it says about its own instances holds
    made = type(f"Quant{original.__name__}", (original, QuantMultiplier), {
        "forward": forward, "__doc__": original.__doc__, "__module__": original.__module__,
        "__reduce_ex__": QuantMultiplier.__reduce_ex__, "full_precision": original,
    })
    return made


def full_precision_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that `multiplier_class` made `kind` of; any other class itself."""
    return vars(kind).get("full_precision", kind) if issubclass(kind, QuantMultiplier) else kind


def multiply_quantized_(
    module: nn.Module, products: Mapping[str, QuantizedProduct], multiplier: Multiplier, name: str
) -> None:
    """Give `module` the quantizers of its products, in place; see `retype_` for why its class is assigned."""
    module.products = nn.ModuleDict(products)
    module.product_calls, module.product_owner = multiplier.calls, name
    module.__class__ = multiplier_class(type(module))


def product_quantizers(multiplier: Multiplier, spec: QuantSpec, name: str) -> dict[str, QuantizedProduct]:
    """Return the quantizers that `spec` asks for on the products of the module called `name`."""
    made = {}
    for call in multiplier.calls:
        for key in call.keys:
            site = product_site(name, key)
            left_is_map, right_is_map = (kind_of(key) == "av", False) if call.fused else call.maps
            # the axis that is summed over: keys of a fused call are not transposed yet
            summed = -1 if call.fused and kind_of(key) == "qk" else -2
            made[key] = QuantizedProduct(
                _build(spec, left_is_map, f"{site}.left_quantizer", -1),
                _build(spec, right_is_map, f"{site}.right_quantizer", summed),
            )
    return made


def quantized_products(model: nn.Module) -> Iterator[tuple[str, QuantizedProduct]]:
    """Yield (name, quantizers) of all products, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedProduct))


class _Unbroken:
    """Makes torch.compile leave to Python what it cannot trace as one graph: two would be intercepted as they run."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _Interception(TorchFunctionMode):
    """Sends the operands of a module's products through their quantizers, while its forward runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.products, self.calls = module.products, iter(module.product_calls)
        self.name = module.product_owner or type(module).__name__

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in MATRICES and function is not ATTENTION:
            return function(*args, **kwargs)
        call = next(self.calls, None)
        if call is None or call.fused != (function is ATTENTION):
            raise QuantizationError(
                f"{self.name} multiplies activations otherwise than when it was quantized: quantize the network anew "
                "with an example of this call, or keep the module in full precision by quantization.keep_fp"
            )
        if not call.keys:
            return function(*args, **kwargs)
        if call.fused:
            return attention(*(self.products[key] for key in call.keys), *args, **kwargs)
        return _multiplied(self.products[call.keys[0]], function, plain_arguments(function, args), kwargs)


def attention(
    qk: QuantizedProduct, av: QuantizedProduct, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q k^T scale + mask) v, as `F.scaled_dot_product_attention` does, on quantized operands.

    16-bit types are computed in float32, as its plain implementation does.

    Args:
        qk: quantizers of q and k.
        av: quantizers of the softmax map and of v.
        query: [..., H, L, D].
        key: [..., H, S, D], of fewer heads with `enable_gqa`.
        value: [..., H, S, E].
        attn_mask: bool (False: no weight) or float (added), broadcast to [..., H, L, S].
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    heads = query.shape[-3] // key.shape[-3] if enable_gqa else 1

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q, k = _wide(q), _wide(k)
        k = k.repeat_interleave(heads, -3) if heads > 1 else k
        return torch.matmul(q, k.transpose(-2, -1)) * scale

    def mixed(weights: Tensor, v: Tensor) -> Tensor:
        v = _wide(v)
        return torch.matmul(weights, v.repeat_interleave(heads, -3) if heads > 1 else v)

    found = qk(query, key, scores)
    if is_causal:
        attn_mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            found = found.masked_fill(~attn_mask, -math.inf)
        else:
            found = found + attn_mask
    weights = found.softmax(-1)
    if attn_mask is not None:  # a query without keys has no weights
        weights = weights.masked_fill((found == -math.inf).all(-1, keepdim=True), 0.0)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return av(weights, value, mixed).to(query.dtype)


def _multiplied(product: QuantizedProduct, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    places = places_of_factors(function, args, kwargs)
    if places is None:
        raise QuantizationError(f"{function.__name__}: expected two matrices, found {len(args)} arguments")

    def multiply(*factors: Tensor) -> Any:
        positional, keywords = list(args), dict(kwargs)
        for place, factor in zip(places, factors, strict=True):
            (positional if isinstance(place, int) else keywords)[place] = factor
        return function(*positional, **keywords)

    return product(*(args[place] if isinstance(place, int) else kwargs[place] for place in places), multiply)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _active(quantizer: nn.Module) -> bool:
    if isinstance(quantizer, nn.Identity):
        return False
    watched = bool(quantizer._forward_pre_hooks or quantizer._forward_hooks)
    return watched or getattr(quantizer, "mode", Mode.QUANTIZE) != Mode.OFF


def _build(of: QuantSpec, is_map: bool, name: str, axis: int) -> nn.Module:
    spec = of.softmax if is_map else of.product
    if spec is None:
        return nn.Identity()
    return activation_quantizer(spec, axis=axis if spec.format is not None else -1, name=name, non_negative=is_map)


def _blank(original: type[nn.Module]) -> nn.Module:
    """Make the module that is filled when it is unpickled."""
    kind = multiplier_class(original)
    return kind.__new__(kind)
