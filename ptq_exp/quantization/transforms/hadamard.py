"""Regular Hadamard matrices: orthogonal, of equal entries but for their signs, and with equal sums of all rows.

Sylvester's matrices have a row of ones: on an activation of constant sign it adds all channels up to one outlier.
Regular ones have none (ConvRot); they exist for sizes 4^k as Kronecker powers of one of size 4, which is symmetric.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from ptq_exp.errors import QuantizationError

BASE = 4
_FOUR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def is_power_of_four(n: int) -> bool:
    """Whether n = 4^k, k >= 0."""
    return n > 0 and n & (n - 1) == 0 and n.bit_length() % 2 == 1


def regular_hadamard(n: int) -> Tensor:
    """Return the regular Hadamard matrix of size n = 4^k, float64 [n, n]: symmetric, orthogonal, rows that sum to 1.

    Raises:
        QuantizationError: n is no power of 4.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not is_power_of_four(n):
        raise QuantizationError(f"regular_hadamard: there is none of size {n}: choose a power of 4")
    signs = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(n.bit_length() // 2):
        signs = torch.kron(signs, torch.tensor(_FOUR, dtype=torch.float64))
    return signs / n**0.5  # the root of a power of 4 is exact


def block_size(channels: int, largest: int = 256, parts: tuple[int, ...] = ()) -> int:
    """Return the largest size 4^k <= `largest` of blocks that fill `channels`, and each of its `parts`; 1 = none.

    Args:
        largest: a power of 4.
        parts: sizes of contiguous parts of the channels that no block may cross.
    """
    common, size = gcd(channels, *parts), largest
    while size > 1 and common % size:
        size //= BASE
    return size
