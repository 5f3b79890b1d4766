"""Copies of states to a device and back, for which a GPU does not wait: they go by way of pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Sequence[Any]
"""The arguments of one call, each [n, ...], the first a tensor; see `ptq_exp.quantization.trace.evaluate`."""


def pinned_copies(values: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], object]]:
    """Begin to copy tensors of a GPU to pinned memory; returns the copies, and what waits until they are complete."""
    copies = [torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for value in values]
    for copy, value in zip(copies, values, strict=True):
        copy.copy_(value, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values[0].device))
    return copies, done.synchronize


class Rows:
    """Puts tensors of a device into rows of CPU tensors, while the device computes the next ones.

    Args:
        device: that they come from.
        copies: begins to copy them; another one than `pinned_copies` is for tests.
    """

    def __init__(self, device: torch.device, copies: Callable = pinned_copies) -> None:
        self._copies = copies if device.type == "cuda" or copies is not pinned_copies else None
        self._waiting: tuple[list[Tensor], list[Tensor], Callable[[], object]] | None = None

    def put(self, places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Put each of `values` into the CPU tensor at its place among `places`, of the same shape; see `finish`."""
        if self._copies is None:
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            return
        begun = self._copies(values)
        self.finish()  # of those before
        self._waiting = (list(places), *begun)

    def finish(self) -> None:
        """Wait until everything is in its place."""
        if self._waiting is None:
            return
        places, copies, wait = self._waiting
        wait()
        for place, copy in zip(places, copies, strict=True):
            place.copy_(copy)
        self._waiting = None
