"""Conditions that samples are drawn with: which of K sample i has depends on (seed, i) alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq_exp.diffusion.noise import EVALUATION, sample_generator
from ptq_exp.errors import DataError, naming
from ptq_exp.storage.finite import is_finite
from ptq_exp.storage.npz import npz_arrays

WITHOUT = "unconditional."
"""In a file of conditions: what begins the names of those that stand for "no condition"."""


def balanced(n_choices: int, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> Tensor:
    """One of `n_choices` for each sample, int64 [N]: a permutation of all, repeated, so that they are balanced.

    That of sample i depends on (seed, i) alone; every run of `n_choices` consecutive indices from a multiple of
    `n_choices` holds each once.
    """
    order = torch.randperm(n_choices, generator=sample_generator(seed, 0, stream))
    return order[torch.as_tensor(list(indices), dtype=torch.long) % n_choices]


@dataclass(frozen=True)
class ConditionTable:
    """K conditions, such as embedded prompts, each made of one tensor for each argument of the network.

    Attributes:
        rows: {argument name: tensor [K, ...]}, float32 or int64.
        unconditional: {argument name: tensor [...]}, what a sample without the condition has: for guidance.

    Raises:
        DataError: there is no row, names have different numbers of them, or a tensor of `unconditional` is not one of
            `rows` without its first dimension.
    """

    rows: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(value) if value.ndim else 0 for name, value in self.rows.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            found = ", ".join(f"{n} of {name}" for name, n in lengths.items()) or "none"
            raise DataError(f"conditions: found {found}; give one row or more, and as many of each name")
        for name, value in self.unconditional.items():
            wanted = tuple(self.rows[name].shape[1:]) if name in self.rows else None
            if tuple(value.shape) != wanted:
                found = "there is no such condition" if wanted is None else f"a row of {name} has {wanted}"
                raise DataError(f"conditions: {WITHOUT}{name} has the shape {tuple(value.shape)}, but {found}")

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def draw(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> dict[str, Tensor]:
        """Those of sample `indices`, [N, ...]; see `balanced`."""
        chosen = balanced(len(self), indices, seed, stream)
        return {name: value[chosen] for name, value in self.rows.items()}

    @classmethod
    def read(cls, path: str | os.PathLike) -> ConditionTable:
        """Read an `.npz` file: NAME [K, ...] and, for guidance, `unconditional.NAME` [...] of each argument.

        Raises:
            DataError: the file is missing or damaged, or holds something else than finite numbers of such shapes.
        """
        if not Path(path).is_file():
            raise DataError(f"model.conditions={path}: no such file; give an .npz file of arrays [K, ...]")
        with naming(f"model.conditions={path}: "):
            tensors = {name: _tensor(name, array) for name, array in npz_arrays(path).items()}
            rows = {name: value for name, value in tensors.items() if not name.startswith(WITHOUT)}
            without = {name.removeprefix(WITHOUT): tensors[name] for name in tensors if name not in rows}
            return cls(rows, without)


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name} is {array.dtype}: conditions are numbers")
    if not is_finite(array):
        raise DataError(f"{name} holds NaN or infinity")
    return torch.tensor(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
