"""Finding the ranges of a quantized model: weights first, then activations of the weight-quantized model.

`calibrate_` is the whole of it; in parts it is

calibrate_weights_(model, metric)
with calibrating(model):
    for batch in calibration_set:
        evaluate(model, batch)
finish_calibration(model, metric)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.parallel import side_by_side
from ptq_exp.quantization.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer
from ptq_exp.quantization.trace.evaluate import evaluate, evaluating

_LARGE = 1 << 22  # numbers of a weight above which its search keeps all threads busy, and takes the memory of several


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield (name, quantizer) in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


def has_quantized_weight(module: nn.Module) -> bool:
    """Whether `module` is a layer whose weight has a quantizer."""
    return isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer)


def set_mode(model: nn.Module, mode: Mode | str) -> None:
    """Set the mode of all quantizers; ``observe`` concerns those of activations alone."""
    mode = Mode(mode)
    for _, quantizer in quantizers(model):
        if mode is not Mode.OBSERVE or isinstance(quantizer, ActivationQuantizer):
            quantizer.mode = mode


@contextmanager
def _mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    before = [(quantizer, quantizer.mode) for _, quantizer in quantizers(model)]
    set_mode(model, mode)
    try:
        yield
    finally:
        for quantizer, own in before:
            quantizer.mode = own


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Switch all quantizers off inside the context; each one's mode is restored at its end.

    Weights that are frozen stay quantized: their full-precision values are gone.
    """
    return _mode(model, Mode.OFF)


@contextmanager
def calibrating(model: nn.Module, chosen: Collection[str] | None = None) -> Iterator[None]:
    """Let the activation quantizers observe inside the context; each one's mode is restored at its end.

    Activations pass unquantized, through the frozen, quantized weights, in evaluation mode. Several contexts add up
    until `finish_calibration`. An error inside discards what was observed.

    Args:
        model: its weights are calibrated.
        chosen: names of the quantizers that observe, the others only let pass; None = all.
    """
    try:
        with _mode(model, Mode.OBSERVE), evaluating(model):
            for name, quantizer in _activations(model):
                if chosen is not None and name not in chosen:
                    quantizer.mode = Mode.OFF
            yield
    except BaseException:
        for _, quantizer in _activations(model):
            quantizer.forget()
        raise


def calibrate_(model: nn.Module, metric: str, batches: Iterable[Sequence]) -> None:
    """Find all ranges of `model` by `metric`: of its weights, which are frozen, then of its activations on `batches`.

    Args:
        batches: arguments of one call of `model` each: positional ones, and a mapping of others at their end.

    Raises:
        PTQError: as the parts of it, see above.
    """
    calibrate_weights_(model, metric)
    calibrate_activations_(model, metric, batches)


def calibrate_activations_(model: nn.Module, metric: str, batches: Iterable[Sequence]) -> None:
    """Find the activation ranges of `model`, whose weights are calibrated, on `batches` (of the bin in force)."""
    with calibrating(model), torch.no_grad():
        for batch in batches:
            evaluate(model, batch)
    finish_calibration(model, metric)
    check_weights(model)


def check_weights(model: nn.Module) -> None:
    """Raise QuantizationError if a frozen weight holds other values than its quantized ones."""
    for layer in _quantized_weights(model):
        quantizer = layer.weight_quantizer
        if quantizer.baked and (off := quantizer.off_grid(layer.weight)):
            raise QuantizationError(
                f"{quantizer.name}: {off} of {layer.weight.numel()} weights are not on the grid of their ranges: the "
                "network changes them when it runs; keep the layer in full precision by quantization.keep_fp"
            )


def calibrate_weights_(model: nn.Module, metric: str, on_layer: Callable[[], object] = lambda: None) -> None:
    """Search the range of every weight by `metric` and freeze: each weight now holds its quantized values.

    `on_layer` is called after each weight (a progress bar).

    Raises:
        QuantizationError: a weight is frozen already.
        PTQError: a weight holds NaN or infinity; the message names the layer.
    """
    found: list[tuple[Tensor, Callable[[], None]]] = []
    for layer in _quantized_weights(model):
        weight = cast("Tensor", layer.weight)
        found.append((weight, partial(cast("WeightQuantizer", layer.weight_quantizer).search, weight, metric)))
    _run(found, on_layer)
    freeze_weights_(model)


def freeze_weights_(model: nn.Module) -> None:
    """Bake every calibrated weight into its parameter; frozen weights are left alone.

    Raises:
        QuantizationError: a weight is not calibrated.
    """
    for layer in _quantized_weights(model):
        layer.weight_quantizer.freeze(layer.weight)


def finish_calibration(model: nn.Module, metric: str) -> None:
    """Search the activation ranges by `metric` over all data observed, and drop the observations.

    With bins of sampling steps it may be called after each bin, to hold the observations of one bin at a time.

    Raises:
        QuantizationError: some quantizers saw no data; the message names them and no range is changed.
    """
    unseen = [name for name, quantizer in _activations(model) if not quantizer.saw_data]
    if unseen:
        shown = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        raise QuantizationError(
            f"{len(unseen)} activation quantizers saw no data: {shown}; run the model inside "
            "calibrating(model), or keep layers that it never calls in full precision by a rule"
        )
    _run([(cast("Tensor", q.scale), partial(q.finish, metric)) for _, q in _activations(model)])


def _run(
    searches: Iterable[tuple[Tensor, Callable[[], None]]], on_done: Callable[[], object] = lambda: None
) -> None:
    """Run searches, each given with a tensor that it reads: those of small ones on the CPU side by side.

    The others are run one after the other here: threads would not wait for what the caller's stream of a GPU computes.
    """
    small: list[Callable[[], None]] = []
    others: list[Callable[[], None]] = []
    for tensor, search in searches:
        (small if tensor.numel() <= _LARGE and tensor.device.type == "cpu" else others).append(search)
    side_by_side(small, on_done)
    for search in others:
        search()
        on_done()


def _activations(model: nn.Module) -> list[tuple[str, ActivationQuantizer]]:
    return [(name, module) for name, module in quantizers(model) if isinstance(module, ActivationQuantizer)]


def _quantized_weights(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if has_quantized_weight(module)]
