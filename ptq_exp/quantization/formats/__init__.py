"""Number formats: the values that a code can stand for, and the scales that blocks of values share.

`FORMATS[name]` is a frozen dataclass: a `FloatFormat`, which casts value by value, or a `BlockFormat`, which finds its
scales from the data.
"""

import torch
from torch import Tensor

from ptq_exp.quantization.formats.blocks import BlockFormat, Encoded
from ptq_exp.quantization.formats.codebook import CODEBOOKS, CodebookFormat
from ptq_exp.quantization.formats.elementwise import ELEMENTWISE, FloatFormat
from ptq_exp.quantization.formats.mx import MICROSCALING, SCALE_RULES, MXFormat
from ptq_exp.quantization.formats.nvfp4 import NVFP4, NVFP4Format
from ptq_exp.quantization.formats.tables import TABLES, IntegerGroups, TableFormat

FORMATS: dict[str, FloatFormat | BlockFormat] = {**ELEMENTWISE, **MICROSCALING, **NVFP4, **TABLES, **CODEBOOKS}
"""Name -> number format."""


def limits(made: FloatFormat | BlockFormat, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest and largest value in units of the scale, each like `like`; zeros where blocks have their own."""
    most = torch.full_like(like, 0.0 if isinstance(made, BlockFormat) else made.largest)
    return 0 - most, most


__all__ = [
    "FORMATS", "SCALE_RULES", "BlockFormat", "CodebookFormat", "Encoded", "FloatFormat", "IntegerGroups", "MXFormat",
    "NVFP4Format", "TableFormat", "limits",
]
