"""How a rule rounds the weight and the input of a layer, for transforms that look at the error of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq_exp.quantization.affine import QRange, choose_qparams, fake_quantize
from ptq_exp.quantization.layers import layer_quantizers
from ptq_exp.quantization.quantizer import ActivationQuantizer
from ptq_exp.quantization.quantizer.base import columns
from ptq_exp.quantization.quantizer.formats import format_of
from ptq_exp.quantization.specs import QuantSpec

WEIGHT_METRIC = "minmax"
"""Of the range of weights, as the methods have it: it holds all of them."""
INPUT_METRIC = "mse"
"""Of the scale of inputs in number formats."""
SHARES = [1 - n / 10 for n in range(9)]
"""Of the range of inputs, tried for the range that they are quantized by: 1 to 0.2."""
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

    Scales that follow the data are those of the row, or of its blocks, as in the network.
    The range is the best of a few shares of that of the rows: a search of the run's metric would take too long for all
    that transforms try. Of candidate widths the least counts; bins of sampling steps are one here.
    """
    if spec.input is None:
        return lambda x: x
    bits = min(spec.input.bits) if isinstance(spec.input.bits, tuple) else spec.input.bits
    made = replace(spec, weight=None, input=replace(spec.input, bits=bits, bins=1, metric=None), output=None)
    quantizer = layer_quantizers(layer, made, "")["input_quantizer"].to(rows.device)

    def laid_out(x: Tensor) -> Tensor:
        """[n, in * kernel] with the channels on the axis that the quantizer counts them on."""
        x = x.to(torch.float32)
        return x if isinstance(layer, nn.Linear) else x.view(len(x), *layer.weight.shape[1:])

    if not isinstance(quantizer, ActivationQuantizer) or not quantizer.needs_data:
        pass  # scales follow the data
    elif format_of(quantizer):
        quantizer.observe(laid_out(rows))
        quantizer.finish(INPUT_METRIC)
    else:
        parts = [_range_of(part, bits, quantizer.symmetric) for part in quantizer.split(laid_out(rows))]
        quantizer.set_range(columns(parts, rows=1))
    return lambda x: quantizer(laid_out(x)).flatten(1).to(x.dtype)


def _range_of(x: Tensor, bits: int, symmetric: bool) -> QRange:
    """Return the range of least squared error among `SHARES` of that of `x`."""
    low, high = x.amin(), x.amax()
    ranges = [choose_qparams(low * share, high * share, bits, symmetric) for share in SHARES]
    errors = [float((fake_quantize(x, *found) - x).square().sum()) for found in ranges]
    return ranges[errors.index(min(errors))]
