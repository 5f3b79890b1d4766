"""Which quantizers the operands of a network's multiplications come from, seen where the multiplications happen.

A quantized operand is one that a quantizer returned, with nothing but copies and views between it and the
multiplication. That a layer has quantizers says nothing yet: hooks may change what they returned, and code outside the
layer may use its weight without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq_exp.quantization.calibrate import quantizers
from ptq_exp.quantization.cost.macs import attention_modules, multiplying_layers, plainly
from ptq_exp.quantization.cost.owners import Owners
from ptq_exp.quantization.products import quantized_products
from ptq_exp.quantization.quantizer import Quantizer
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.factors import MATRICES, places_of_factors, plain_arguments
from ptq_exp.quantization.trace.products import ATTENTION
from ptq_exp.quantization.trace.provenance import MOVES, Notes

# which positional arguments are multiplied
_LAYERS = {F.linear: (0, 1), F.conv1d: (0, 1), F.conv2d: (0, 1)}
_KEYWORDS = {"input": 0, "weight": 1, "query": 0, "key": 1, "value": 2}


@dataclass(frozen=True)
class Source:
    """Where an operand comes from: `quantizer`, which returned it in `dtype`.

    Of a quantizer whose scales follow the data, and where values are looked at: the `levels` that it returned, and how
    many elements were `off_grid` there. Views cut its blocks, so that these cannot be found in an operand.
    """

    quantizer: Quantizer
    dtype: torch.dtype
    levels: Tensor | None = None
    off_grid: int = 0

    def off_grid_of(self, x: Tensor) -> int:
        """Count the elements of an operand `x`, in `dtype`, that are no level of the quantizer."""
        if self.levels is None:
            return self.quantizer.off_grid(x)
        return self.off_grid + int((~torch.isin(x, self.levels)).sum())


def _source(quantizer: Quantizer, read: Tensor, output: Tensor, values: bool) -> Source:
    if not (values and quantizer.dynamic):
        return Source(quantizer, output.dtype)
    return Source(quantizer, output.dtype, output.unique(), quantizer.returned_off_grid(read, output))


@dataclass(frozen=True)
class Operand:
    """One operand of a multiplication.

    The quantizer it comes from (None: full precision), and how many of its elements do not lie on the grid of that
    quantizer (0 where nobody looked).
    """

    quantizer: Quantizer | None
    off_grid: int = 0


Products = list[tuple[Operand, Operand]]


@dataclass
class Operands:
    """The multiplications of one evaluation, in order.

    Attributes:
        layers: {layer: (input, weight) of each}, of convolutions and linear layers.
        attention: {attention: pairs}, two for each call: (q, k), (softmax map, v); of `QuantAttention`.
        products: {product: pairs} of all other modules that multiply quantized activations.
        called: names of the layers that were called.
    """

    layers: dict[str, Products] = field(default_factory=lambda: defaultdict(list))
    attention: dict[str, Products] = field(default_factory=lambda: defaultdict(list))
    products: dict[str, Products] = field(default_factory=lambda: defaultdict(list))
    called: set[str] = field(default_factory=set)


def operands_of(model: nn.Module, inputs: tuple, *, values: bool = False) -> Operands:
    """Evaluate `model` once on `inputs` (see `evaluate`) and see what it multiplies.

    Args:
        model: with quantizers, on or off; left as it was.
        values: also compare the operands with the grids of their quantizers, which are calibrated and on.
    """
    layers, attentions = dict(multiplying_layers(model)), dict(attention_modules(model))
    products = dict(quantized_products(model))
    found, owners = Operands(), Owners(layers, {**attentions, **products})

    def carry(function: Callable, args: tuple, kwargs: dict, output: Tensor, notes: Notes) -> Source | None:
        args = plain_arguments(function, args)
        given = dict(enumerate(args)) | {_KEYWORDS.get(key, key): value for key, value in kwargs.items()} | kwargs

        def operand(place: int | str) -> Operand:
            return _operand(given.get(place), notes.of(given.get(place)), values)

        if not (function in _LAYERS or function in MATRICES or function is ATTENTION):
            return notes.of(given.get(0)) if function in MOVES else None
        name = owners.of(tuple(given.values()))
        if function in _LAYERS and name in layers:
            found.layers[name].append(tuple(map(operand, _LAYERS[function])))
        elif name in products and function in MATRICES:
            found.products[name].append(_factors(function, args, kwargs, operand))
        elif name in attentions and function in MATRICES:
            found.attention[name].append(_factors(function, args, kwargs, operand))
        elif name in attentions and function is ATTENTION:
            found.attention[name] += [(operand(0), operand(1)), (Operand(None), operand(2))]
        elif name in layers:  # its weight, in a product that is no layer's
            found.layers[name].append((Operand(None), Operand(None)))
        return None

    notes = Notes(carry)
    with plainly(model), owners, _noting(model, notes, values), ExitStack() as hooks, notes:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, name=name: found.called.add(name)))
        # not model(...): a compiled one would be compiled again because of the hooks
        evaluate(model.forward, inputs)
    return found


def _factors(
    function: Callable, args: tuple, kwargs: dict, operand: Callable[[int | str], Operand]
) -> tuple[Operand, Operand]:
    """Return the two matrices that are multiplied; full precision where they are not two."""
    places = places_of_factors(function, args, kwargs)
    return (Operand(None), Operand(None)) if places is None else (operand(places[0]), operand(places[1]))


@contextmanager
def _noting(model: nn.Module, notes: Notes, values: bool) -> Iterator[None]:
    """Note on every tensor that a quantizer of `model` returns which one it was."""

    def note(quantizer: Quantizer, read: tuple, output: Tensor) -> Tensor:
        # one that is off returns its argument, which others may read, too: another name for the same values
        returned = output.view_as(output)
        notes.set(returned, _source(quantizer, read[0], output, values))
        return returned

    with ExitStack() as hooks:
        for _, quantizer in quantizers(model):
            hooks.enter_context(quantizer.register_forward_hook(note))
        yield


def _operand(tensor: Any, source: Source | None, values: bool) -> Operand:
    if source is None or not isinstance(tensor, Tensor):
        return Operand(None)
    if not values:
        return Operand(source.quantizer)
    original = tensor.to(source.dtype)  # a wider type holds the same values
    changed = int((original.to(tensor.dtype) != tensor).sum())
    return Operand(source.quantizer, changed + source.off_grid_of(original))
