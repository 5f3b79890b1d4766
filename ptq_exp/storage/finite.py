"""Refuse NaN and infinity in what was read, naming the file, the tensor and the setting.

Arrays of numpy and tensors of torch alike. Nothing is copied: the smallest and the largest value say all, as NaN
spreads to both, and mapped files are read through once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ptq_exp.errors import DataError, PTQError


def extremes(values: Any) -> tuple[float, float] | None:
    """Return the smallest and the largest value of an array or a tensor, both NaN where it holds NaN.

    None = it is empty, or holds no real numbers.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind != "f" or values.size == 0:
            return None
        with np.errstate(invalid="ignore"):  # NaN is what is looked for
            return float(values.min()), float(values.max())
    if not values.is_floating_point() or values.numel() == 0 or values.is_meta:
        return None
    values = values.detach()
    low, high = (values.float() if values.element_size() == 1 else values).aminmax()  # torch compares no 8-bit numbers
    return float(low), float(high)


def is_finite(values: Any, *, or_infinite: bool = False) -> bool:
    """Return whether an array or a tensor holds neither NaN nor infinity; with `or_infinite`, no NaN."""
    found = extremes(values)
    if found is None:
        return True
    return not any(math.isnan(end) for end in found) if or_infinite else all(math.isfinite(end) for end in found)


def require_finite(
    arrays: Mapping[str, Any] | Iterable[tuple[str, Any]], where: object, remedy: str,
    error: type[PTQError] = DataError,
) -> None:
    """Raise unless all arrays or tensors by name hold finite numbers (or whole ones).

    Args:
        where: the file, and the setting that names it: the beginning of the message.
        remedy: what to do about it: its end.

    Raises:
        error: one holds NaN or infinity; the message names the first.
    """
    for name, values in arrays.items() if isinstance(arrays, Mapping) else arrays:
        if not is_finite(values):
            raise error(f"{where}: {name} holds {bad_values(values)}; {remedy}")


def bad_values(values: Any) -> str:
    """Describe how many of `values`, not all of which are finite, are NaN or infinite."""
    finite = np.isfinite(values) if isinstance(values, np.ndarray) else values.isfinite()
    size = math.prod(values.shape)
    return f"NaN or infinity in {size - int(finite.sum())} of {size} values"
