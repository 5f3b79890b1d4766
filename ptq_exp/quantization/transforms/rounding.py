"""How a rule rounds the weight and the input of a layer, for transforms that look at the error of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq_exp.quantization.layers import layer_quantizers
from ptq_exp.quantization.specs import QuantSpec

WEIGHT_METRIC, INPUT_METRIC = "minmax", "mse"
"""Of the range searches here, which are many: a weight's range holds all of it, an input's has the least error."""
Round = Callable[[Tensor], Tensor]


def weight_rounding(layer: nn.Module, spec: QuantSpec) -> Round:
    """Return what quantizes and dequantizes a weight [out, in * kernel] of `layer`, with a range of its own each time.

    Plain rounding: one that is learned, or makes up for errors, comes after transforms.
    """
    if spec.weight is None:
        return lambda matrix: matrix

    def rounded(matrix: Tensor) -> Tensor:
        made = replace(spec, weight=replace(spec.weight, metric=None), input=None, output=None)
        quantizer = layer_quantizers(layer, made, "")["weight_quantizer"].to(matrix.device)
        weight = matrix.to(torch.float32).view(layer.weight.shape)
        quantizer.search(weight, WEIGHT_METRIC)
        return quantizer(weight).flatten(1).to(matrix.dtype)

    return rounded


def input_rounding(layer: nn.Module, spec: QuantSpec, rows: Tensor) -> Round:
    """Return what quantizes and dequantizes rows [n, in * kernel] that `layer` multiplies, by a range for all `rows`.

    Of candidate widths the least counts; bins of sampling steps are one here.
    """
    if spec.input is None:
        return lambda x: x
    bits = spec.input.bits if isinstance(spec.input.bits, int) else min(spec.input.bits)
    made = replace(spec, weight=None, input=replace(spec.input, bits=bits, bins=1, metric=None), output=None)
    quantizer = layer_quantizers(layer, made, "")["input_quantizer"].to(rows.device)

    def laid_out(x: Tensor) -> Tensor:
        """[n, in * kernel] with the channels on the axis that the quantizer counts them on."""
        x = x.to(torch.float32)
        return x if isinstance(layer, nn.Linear) else x.view(len(x), *layer.weight.shape[1:])

    quantizer.observe(laid_out(rows))
    quantizer.finish(INPUT_METRIC)
    return lambda x: quantizer(laid_out(x)).flatten(1).to(x.dtype)
