"""Which layers read a tensor that lies on a quantizer's grid although their own input has no quantizer.

With activation quantizers on outputs, a multiplication reads quantized values only where nothing but copies and views
lie between the quantizer and the layer.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from ptq_exp.quantization.layers import bits_of
from ptq_exp.quantization.provenance import MOVES, Notes, watching
from ptq_exp.quantization.report import Bits


def grid_inputs(model: nn.Module, example_inputs: tuple) -> dict[str, Bits]:
    """Layers without an input quantizer that read only quantized values, with the bits of these.

    Args:
        model: with quantizers, all switched off.
        example_inputs: positional arguments of one sample.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    readers = {n: m for n, m in layers.items() if bits_of(getattr(m, "input_quantizer", None)) is None}
    writers = [m for m in layers.values() if bits_of(getattr(m, "output_quantizer", None)) is not None]
    if not readers or not writers:
        return {}

    def carry(function, args: tuple, kwargs: dict, output: Tensor, notes: Notes) -> Bits:
        return notes.of(args[0] if args else kwargs.get("input")) if function in MOVES else None

    seen: dict[str, set[Bits]] = defaultdict(set)
    notes = Notes(carry)
    with watching(model) as watch, notes:
        for name, layer in readers.items():
            watch(layer, before=lambda x, name=name: seen[name].add(notes.of(x)))
        for layer in writers:
            watch(layer, after=lambda y, layer=layer: notes.set(y, bits_of(layer.output_quantizer)))
        model(*example_inputs)
    return {name: bits for name, (bits, *others) in ((n, [*found]) for n, found in seen.items()) if bits and not others}
