"""The ranges of a quantized model as plain arrays, to calibrate once and quantize again from the FP weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ptq_exp.errors import DataError
from ptq_exp.quantization.affine import QRange, check_range
from ptq_exp.quantization.calibrate import freeze_weights_, quantizers


def range_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the ranges of all quantizers: {"<quantizer>.<field>": [rows, segments]}, fields of `QRange`.

    Of weights in block formats their scales, too.
    """
    return {
        f"{name}.{field}": getattr(quantizer, field).cpu().numpy()
        for name, quantizer in quantizers(model)
        for field in (*QRange._fields, *quantizer.scale_names)
    }


def restore_ranges_(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Give a model with quantizers and full-precision weights the ranges that `range_arrays` took, and freeze it.

    Raises:
        DataError: the arrays are those of other quantizers, or no ranges; the model is left unchanged.
    """
    wanted = range_arrays(model)
    wrong = sorted(set(wanted) ^ set(arrays)) or [key for key in wanted if arrays[key].shape != wanted[key].shape]
    if wrong:
        raise DataError(f"the stored ranges belong to other quantizers: {', '.join(wrong[:3])} do not fit")
    found = {
        name: QRange(*(torch.from_numpy(np.array(arrays[f"{name}.{field}"])) for field in QRange._fields))
        for name, _ in quantizers(model)
    }
    for name, qrange in found.items():
        check_range(name, qrange)
    for name, quantizer in quantizers(model):
        quantizer.set_range(found[name])
        for field in quantizer.scale_names:
            getattr(quantizer, field).copy_(torch.from_numpy(np.array(arrays[f"{name}.{field}"])))
    freeze_weights_(model)
