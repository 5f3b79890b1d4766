"""Functions that multiply two matrices, and where these stand among their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_FACTORS = ((0, ("input",)), (1, ("other", "mat2")))
_ADDED = ((1, ("batch1", "mat1")), (2, ("batch2", "mat2")))
MATRICES: dict[Callable, tuple[tuple[int, tuple[str, ...]], ...]] = {
    **dict.fromkeys((
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.linalg.matmul, torch.bmm, torch.Tensor.bmm,
        torch.mm, torch.Tensor.mm,
    ), _FACTORS),
    **dict.fromkeys((
        torch.baddbmm, torch.Tensor.baddbmm, torch.Tensor.baddbmm_, torch.addmm, torch.Tensor.addmm,
        torch.Tensor.addmm_, torch.addbmm, torch.Tensor.addbmm,
    ), _ADDED),
    torch.einsum: ((1, ()), (2, ())),
}
"""Function -> place among its positional arguments, and keywords, of the two matrices that it multiplies."""


def plain_arguments(function: Callable, args: tuple) -> tuple:
    """Positional arguments with each operand in a place of its own; `torch.einsum` takes a list of them, too."""
    if function is torch.einsum and len(args) == 2 and isinstance(args[1], list | tuple):
        return (args[0], *args[1])
    return args


def places_of_factors(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int | str, int | str] | None:
    """Where the two matrices stand that one of `MATRICES` multiplies: a position or a keyword; None: not two."""
    if function is torch.einsum and len(args) != 3:
        return None
    found = []
    for position, names in MATRICES[function]:
        keyword = next((name for name in names if name in kwargs), None)
        if keyword is None and position >= len(args):
            return None
        found.append(position if keyword is None else keyword)
    return found[0], found[1]
