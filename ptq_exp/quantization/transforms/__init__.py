"""Exact re-parametrisations of a network before it is rounded."""

from ptq_exp.quantization.transforms.hadamard import regular_hadamard
from ptq_exp.quantization.transforms.low_rank_split import low_rank_split

__all__ = ["low_rank_split", "regular_hadamard"]
