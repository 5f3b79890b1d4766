"""Post-training quantization of PyTorch networks: quantizers, range search, placement by rules, accounting.

report = quantize_(model, default_rules(8, 8), example_inputs)
calibrate_(model, "lp", batches)

Activations may have several candidate widths, ``default_rules(8, (4, 8))``, or ranges for several bins of sampling
steps, ``default_rules(8, 8, bins=4)``, of which ``select_row(model, row)`` puts one in force from one sampling step to
the next.
"""

from ptq_exp.quantization.affine import (
    QRange,
    choose_qparams,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
)
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
from ptq_exp.quantization.cost.account import describe, range_table
from ptq_exp.quantization.cost.proof import proven, refuted
from ptq_exp.quantization.cost.report import Report, Row
from ptq_exp.quantization.group_rules import group_bits, with_groups
from ptq_exp.quantization.layers import QuantAttention, QuantConv1d, QuantConv2d, QuantLinear
from ptq_exp.quantization.place import quantize_
from ptq_exp.quantization.policy import default_rules, kept, segmented, with_outputs
from ptq_exp.quantization.probe import one_layer_quantized, probe_of, quantized_layers
from ptq_exp.quantization.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer
from ptq_exp.quantization.quantizer.time_step import Step, of_samples, select_row, step_of
from ptq_exp.quantization.ranges.elementwise import HistogramMetric
from ptq_exp.quantization.ranges.range_search import METRICS, RangeSketch, search_range
from ptq_exp.quantization.save import load_quantized_, save_quantized
from ptq_exp.quantization.specs import QuantSpec, Rule, TensorSpec
from ptq_exp.quantization.trace.concats import depending_on_alone, find_chunks, find_concats
from ptq_exp.quantization.trace.tap import ActivationTap

__all__ = [
    "METRICS",
    "ActivationQuantizer",
    "ActivationTap",
    "HistogramMetric",
    "Mode",
    "QRange",
    "QuantAttention",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Quantizer",
    "RangeSketch",
    "Report",
    "Row",
    "Rule",
    "Step",
    "TensorSpec",
    "WeightQuantizer",
    "calibrate_",
    "calibrate_activations_",
    "calibrate_weights_",
    "calibrating",
    "choose_qparams",
    "default_rules",
    "depending_on_alone",
    "dequantize",
    "describe",
    "disabled",
    "fake_quantize",
    "find_chunks",
    "find_concats",
    "finish_calibration",
    "freeze_weights_",
    "group_bits",
    "integer_range",
    "kept",
    "load_quantized_",
    "of_samples",
    "one_layer_quantized",
    "probe_of",
    "proven",
    "quantize",
    "quantize_",
    "quantized_layers",
    "quantizers",
    "range_table",
    "refuted",
    "save_quantized",
    "search_range",
    "segmented",
    "select_row",
    "set_mode",
    "step_of",
    "with_groups",
    "with_outputs",
]
