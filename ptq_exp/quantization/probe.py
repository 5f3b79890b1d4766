"""Some layers quantized, all others in full precision: a probe network whose layers are switched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.calibrate import set_mode
from ptq_exp.quantization.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer


def probe_of(quantized: nn.Module, full_precision: nn.Module) -> nn.Module:
    """Return a copy of the calibrated network `quantized` with the weights of `full_precision` and all quantizers off.

    Raises:
        QuantizationError: the networks have different parameters.
    """
    probe = copy.deepcopy(quantized)
    own, given = dict(probe.named_parameters()), dict(full_precision.named_parameters())
    if wrong := sorted(set(own) ^ set(given)) or [n for n in own if own[n].shape != given[n].shape]:
        raise QuantizationError(f"{', '.join(wrong[:3])}: not the same in both networks")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])
    set_mode(probe, Mode.OFF)
    return probe


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the modules that have quantizers of their own: layers, and attention for its softmax map."""
    return [name for name, module in model.named_modules() if _own(module)]


@contextmanager
def one_layer_quantized(probe: nn.Module, quantized: nn.Module, name: str) -> Iterator[None]:
    """Quantize weight and activations of the layer `name` of `probe` alone, as `quantized` does; undone at the end.

    Args:
        probe: from `probe_of`.
        quantized: the calibrated network, its weights frozen.
        name: one of `quantized_layers`.
    """
    layer, source = probe.get_submodule(name), quantized.get_submodule(name)
    own = _own(layer)
    weight = layer.weight if any(isinstance(q, WeightQuantizer) for q in own) else None
    before = None if weight is None else weight.detach().clone()
    try:
        if weight is not None:
            with torch.no_grad():
                weight.copy_(source.weight)
        for quantizer in own:
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.mode = Mode.QUANTIZE
        yield
    finally:
        for quantizer in own:
            quantizer.mode = Mode.OFF
        if weight is not None:
            with torch.no_grad():
                weight.copy_(before)


@contextmanager
def layers_quantized(probe: nn.Module, quantized: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Quantize several layers of `probe` together, and all others not; see `one_layer_quantized`."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(one_layer_quantized(probe, quantized, name))
        yield


def _own(module: nn.Module) -> list[Quantizer]:
    return [child for child in module.children() if isinstance(child, Quantizer)]
