"""Post-training quantization of PyTorch networks: quantizers, range search, placement by rules, reports.

report = quantize_(model, Policy().rules(Widths(8, 8)), example_inputs)
calibrate_(model, "lp", batches)

Activations may have several candidate widths, ``Widths(8, (4, 8))``, or ranges for several bins of sampling steps,
``Policy().rules(Widths(8, 8), bins=4)``, of which ``select_row(model, row)`` puts one in force from one sampling step
to the next. Names are imported at their first use: the settings take `Policy` without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_HOME` names, for checkers of types and editors
    from ptq_exp.quantization.affine import QRange, choose_qparams, dequantize, fake_quantize, integer_range, quantize
    from ptq_exp.quantization.allocation import Allocation, Budget, Solution
    from ptq_exp.quantization.calibrate import (
        calibrate_,
        calibrate_activations_,
        calibrate_weights_,
        calibrating,
        disabled,
        finish_calibration,
        freeze_weights_,
        quantizers,
        set_mode,
    )
    from ptq_exp.quantization.cost.account import describe, multipliers, range_table
    from ptq_exp.quantization.cost.proof import proven, refuted
    from ptq_exp.quantization.cost.report import Report
    from ptq_exp.quantization.cost.row import Row
    from ptq_exp.quantization.formats import FORMATS
    from ptq_exp.quantization.granularity import Granularity, PerChannel, PerGroup, PerTensor, Segments
    from ptq_exp.quantization.group_rules import group_bits, with_groups
    from ptq_exp.quantization.layers import QuantAttention, QuantConv1d, QuantConv2d, QuantLinear
    from ptq_exp.quantization.place import quantize_
    from ptq_exp.quantization.policy import Policy
    from ptq_exp.quantization.probe import layers_quantized, one_layer_quantized, probe_of, quantized_layers
    from ptq_exp.quantization.quantizer import ActivationQuantizer, DynamicQuantizer, Mode, Quantizer, WeightQuantizer
    from ptq_exp.quantization.quantizer.time_step import Step, of_samples, select_row, step_of
    from ptq_exp.quantization.ranges.elementwise import HistogramMetric
    from ptq_exp.quantization.ranges.range_search import METRICS, RangeSketch, search_range
    from ptq_exp.quantization.rules import kept, segmented, with_outputs
    from ptq_exp.quantization.save import load_quantized_, save_quantized
    from ptq_exp.quantization.specs import QuantSpec, Rule, TensorSpec
    from ptq_exp.quantization.trace.concats import depending_on_alone, find_chunks, find_concats
    from ptq_exp.quantization.trace.readers import sharing
    from ptq_exp.quantization.trace.tap import ActivationTap
    from ptq_exp.quantization.transforms.base import Applied, Cost, Fitting, Transform
    from ptq_exp.quantization.transforms.layers import applied_to
    from ptq_exp.quantization.transforms.registry import TRANSFORMS, applied_from_dict, transforms_of
    from ptq_exp.quantization.widths import Widths

_HOME = {
    "affine": "QRange choose_qparams dequantize fake_quantize integer_range quantize",
    "allocation": "Allocation Budget Solution",
    "calibrate": "calibrate_ calibrate_activations_ calibrate_weights_ calibrating disabled finish_calibration "
    "freeze_weights_ quantizers set_mode",
    "cost.account": "describe multipliers range_table",
    "cost.proof": "proven refuted",
    "cost.report": "Report",
    "cost.row": "Row",
    "formats": "FORMATS",
    "granularity": "Granularity PerChannel PerGroup PerTensor Segments",
    "group_rules": "group_bits with_groups",
    "layers": "QuantAttention QuantConv1d QuantConv2d QuantLinear",
    "place": "quantize_",
    "policy": "Policy",
    "probe": "layers_quantized one_layer_quantized probe_of quantized_layers",
    "quantizer": "ActivationQuantizer DynamicQuantizer Mode Quantizer WeightQuantizer",
    "quantizer.time_step": "Step of_samples select_row step_of",
    "ranges.elementwise": "HistogramMetric",
    "ranges.range_search": "METRICS RangeSketch search_range",
    "rules": "kept segmented with_outputs",
    "save": "load_quantized_ save_quantized",
    "specs": "QuantSpec Rule TensorSpec",
    "trace.concats": "depending_on_alone find_chunks find_concats",
    "trace.readers": "sharing",
    "trace.tap": "ActivationTap",
    "transforms.base": "Applied Cost Fitting Transform",
    "transforms.layers": "applied_to",
    "transforms.registry": "TRANSFORMS applied_from_dict transforms_of",
    "widths": "Widths",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import `name` from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
