"""Products of two activations, such as q k^T and softmax(.) v: which module multiplies them, found by one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ptq_exp.quantization.quantizer import Quantizer
from ptq_exp.quantization.trace.evaluate import tensors_in
from ptq_exp.quantization.trace.factors import MATRICES, places_of_factors, plain_arguments
from ptq_exp.quantization.trace.provenance import MOVES

ATTENTION = F.scaled_dot_product_attention
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
_ACTIVATION, _MAP = 1, 2


@dataclass(frozen=True)
class ProductCall:
    """One call of a function that multiplies, within one forward of a module.

    Attributes:
        fused: whether it is `F.scaled_dot_product_attention`, which multiplies twice.
        keys: names of its products within the module; none if it is no product of two activations, or is not the
            module's own but that of a module inside of it.
        maps: whether the left and the right operand is a softmax map, where it is not fused.
    """

    fused: bool
    keys: tuple[str, ...] = ()
    maps: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Multiplier:
    """A module that multiplies activations itself.

    Attributes:
        calls: of functions that multiply while its forward runs, in their order; of its longest forward.
        obstacle: why their operands cannot be quantized; "" if they can.
    """

    calls: tuple[ProductCall, ...]
    obstacle: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all products."""
        return tuple(key for call in self.calls for key in call.keys)


def kind_of(key: str) -> str:
    """Return what a product is, qk, av or product, without the number that its name may have."""
    return key.partition("_")[0]


def product_site(module: str, key: str) -> str:
    """Return the name in the network of the quantizers of a product, by the names of its module and within it."""
    return f"{module}.products.{key}" if module else f"products.{key}"


class ProductTrace(TorchFunctionMode):
    """Sees, as a context around one forward of `model`, which modules multiply activations.

    An activation is what follows from the inputs of the network or the output of a layer; constants and parameters are
    none. A multiplication belongs to the innermost module whose forward is running.

    Args:
        layers: names of convolutions and linear layers, whose multiplications are counted otherwise.
        attentions: names of modules that multiply activations, but are quantized and counted otherwise, too.
        counting: context that counts multiplications for the name of a product, entered around each.
    """

    def __init__(
        self, model: nn.Module, layers: Collection[str], attentions: Collection[str],
        counting: Callable[[str], AbstractContextManager],
    ) -> None:
        super().__init__()
        self._layers, self._attentions, self._counting = layers, attentions, counting
        self._modules = dict(model.named_modules())
        self._notes = WeakIdKeyDictionary()
        self._stack: list[tuple[str, list[ProductCall]]] = []
        self._seen: dict[str, list[tuple[ProductCall, ...]]] = {}
        self._within: dict[str, set[str]] = {}
        self._hooks = ExitStack()
        self.halves: dict[str, tuple[int, int]] = {}  # widths of the two products of one fused function

    def __enter__(self) -> ProductTrace:
        for name, module in self._modules.items():
            # a script takes no hooks, and its functions are not seen; a quantizer with hooks acts as if it were on
            if isinstance(module, torch.jit.ScriptModule | Quantizer):
                continue
            made = bool(module._parameters)
            self._hooks.enter_context(module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._begin(name, args, kwargs), with_kwargs=True
            ))
            self._hooks.enter_context(module.register_forward_hook(
                lambda _, args, output, made=made: self._end(output if made else None), prepend=True
            ))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def multipliers(self) -> dict[str, Multiplier]:
        """Return the modules that multiplied activations, by name."""
        found = {}
        for name, forwards in self._seen.items():
            calls = max(forwards, key=len)
            if any(call.keys for call in calls):
                found[name] = Multiplier(calls, self._obstacle(name, forwards, calls))
        return found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in MATRICES:
            returned = self._multiplied(function, args, kwargs)
        elif function is ATTENTION:
            returned = self._attended(args, kwargs)
        else:
            returned = function(*args, **kwargs)
        self._follow(function, args, kwargs, returned)
        return returned

    def _begin(self, name: str, args: tuple, kwargs: dict) -> None:
        if not self._stack:  # the network's own inputs
            for value in tensors_in((args, kwargs)):
                self._note(value, _ACTIVATION)
        self._stack.append((name, []))

    def _end(self, made: Any) -> None:
        name, calls = self._stack.pop()
        self._seen.setdefault(name, []).append(tuple(calls))
        for value in tensors_in(made):
            self._note(value, _ACTIVATION)

    def _note(self, value: Tensor, note: int) -> None:
        if value.is_floating_point() and not isinstance(value, nn.Parameter):
            self._notes[value] = note

    def _of(self, value: Any) -> int:
        return self._notes.get(value, 0) if isinstance(value, Tensor) else 0

    def _follow(self, function: Callable, args: tuple, kwargs: dict, returned: Any) -> None:
        """Note on what a function returns, or writes to, that it follows from activations."""
        notes = [self._of(value) for value in tensors_in((args, kwargs))]
        if not any(notes):
            return
        note = _ACTIVATION
        if function in SOFTMAX or (function in MOVES and self._of(args[0] if args else kwargs.get("input")) == _MAP):
            note = _MAP
        written = args[:1] if returned is None else ()  # x[...] = y
        for value in tensors_in((returned, written)):
            self._note(value, note)

    def _multiplied(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        args = plain_arguments(function, args)
        places = places_of_factors(function, args, kwargs)
        factors = [args[place] if isinstance(place, int) else kwargs[place] for place in places or ()]
        keys: tuple[str, ...] = ()
        if factors and all(self._of(factor) for factor in factors) and kwargs.get("out") is None:
            keys = self._keys("product")
        maps = tuple(self._of(factor) == _MAP for factor in factors) if keys else (False, False)
        self._called(ProductCall(False, keys, maps))
        with self._counting_of(keys):
            return function(*args, **kwargs)

    def _attended(self, args: tuple, kwargs: dict) -> Any:
        q, k, v = (args[n] if n < len(args) else kwargs[name] for n, name in enumerate(("query", "key", "value")))
        keys = self._keys("qk", "av") if any(self._of(value) for value in (q, k, v)) else ()
        self._called(ProductCall(True, keys))
        if keys:
            self.halves[product_site(self._stack[-1][0], keys[0])] = q.shape[-1], v.shape[-1]
        with self._counting_of(keys):
            return ATTENTION(*args, **kwargs)

    def _keys(self, *kinds: str) -> tuple[str, ...]:
        """Name the next products of the module that is running; none for one that is ignored."""
        if not self._stack or self._stack[-1][0] in self._layers or self._stack[-1][0] in self._attentions:
            return ()
        before = [key for call in self._stack[-1][1] for key in call.keys]
        count = 1 + sum(kind_of(key) == kinds[0] for key in before)
        return tuple(kind if count == 1 else f"{kind}_{count}" for kind in kinds)

    def _called(self, call: ProductCall) -> None:
        """Add a call to the innermost module, as its own, and to those around it."""
        for name, calls in self._stack[:-1]:
            calls.append(ProductCall(call.fused))
            if call.keys or self._stack[-1][0] in self._attentions:
                self._within.setdefault(name, set()).add(self._stack[-1][0])
        if self._stack:
            self._stack[-1][1].append(call)

    def _counting_of(self, keys: tuple[str, ...]) -> AbstractContextManager:
        return self._counting(product_site(self._stack[-1][0], keys[0])) if keys else ExitStack()

    def _obstacle(self, name: str, forwards: list[tuple[ProductCall, ...]], calls: tuple[ProductCall, ...]) -> str:
        module = self._modules[name]
        if any(forward != calls[: len(forward)] for forward in forwards):
            return "it multiplies otherwise from one call to the next"
        if "forward" in module.__dict__:
            return "its forward was replaced by another function"
        if name in self._within:
            return f"modules inside of it multiply activations, too: {', '.join(sorted(self._within[name]))}"
        if hasattr(module, "products") and not isinstance(module.products, nn.ModuleDict):
            return "it has something else of the name `products`"
        return ""
