"""Which row of the range tables is in force: one index that the quantizers of a model share.

Between sampling steps only the index changes. Nothing is searched, allocated or compiled again, and with the index
already on the device nothing waits for the device either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError


class Step(nn.Module):
    """The row of their buffers ``[rows, segments]`` that the quantizers read, for all samples of a batch or for each.

    A sampler is at one step with all its samples, and chooses by `set`. Calibration samples come from all steps: inside
    `each`, every sample of a batch has a row of its own.

    Each quantizer with several rows holds the one `Step` of its model as a child, so that copies of the model share
    one of their own and `to` moves it. It is no part of the state dict: a row is chosen anew wherever a model runs.

    Args:
        rows: number of rows to choose from.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        # An index of shape [1]: selecting with a 0-d one would break a compiled graph.
        self.register_buffer("row", torch.zeros(1, dtype=torch.long), persistent=False)
        # No row is a safe default: the first one is that of the narrowest width.
        self.is_set = False

    def set(self, row: int | Tensor) -> None:
        """Choose `row`, 0 to ``rows - 1``.

        Args:
            row: a number, or an integer tensor of one element, best on the device of the model: a tensor is copied
                without being looked at, which would wait for the device, and so its value is not checked here.

        Raises:
            QuantizationError: a number out of range, or a tensor of more than one element.
        """
        if isinstance(row, Tensor):
            if row.numel() != 1:
                raise QuantizationError(
                    f"Step.set: found a tensor of shape {list(row.shape)}, expected one element: all samples of a "
                    "batch share one sampling step"
                )
            self.row.copy_(row.reshape(1), non_blocking=True)
        elif not 0 <= row < self.rows:
            raise QuantizationError(f"Step.set: row {row} is out of range, choose 0..{self.rows - 1}")
        else:
            self.row.fill_(row)
        self.is_set = True

    @contextmanager
    def each(self, rows: Tensor) -> Iterator[None]:
        """Inside, sample number n of every batch uses the row ``rows[n]``; what was chosen before holds again after it.

        Args:
            rows: int64 [N], each 0 to ``rows - 1``; best on the CPU, where checking it waits for no device.

        Raises:
            QuantizationError: another shape or type, or a row out of range.
        """
        if rows.ndim != 1 or rows.dtype != torch.long or len(rows) == 0:
            raise QuantizationError(
                f"Step.each: found {rows.dtype} of shape {list(rows.shape)}, expected int64 [N], a row for each sample"
            )
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= self.rows:
            raise QuantizationError(f"Step.each: found rows {low}..{high}, choose 0..{self.rows - 1}")
        before = self.row, self.is_set
        self.row, self.is_set = rows.to(self.row.device), True
        try:
            yield
        finally:
            self.row, self.is_set = before

    def index(self, x: Tensor, name: str) -> Tensor:
        """Return the rows that the tensor `x` uses, int64: [1], or one for each sample, [first dimension of `x`].

        Attention merges its heads into the batch, a sample's heads one after the other: then rows repeat likewise.

        Args:
            name: of the quantizer, for the message.

        Raises:
            QuantizationError: each of N samples has a row, and the first dimension of `x` is no multiple of N.
        """
        n = len(self.row)
        if n == 1:
            return self.row
        if x.ndim < 2 or x.shape[0] == 0 or x.shape[0] % n:
            raise QuantizationError(
                f"{name}: found a tensor of shape {list(x.shape)}, but each of {n} samples has ranges of its own: the "
                f"first dimension must be a multiple of {n}; keep the layer in full precision by quantization.keep_fp, "
                "or choose quantization.temporal=static"
            )
        return self.row if x.shape[0] == n else self.row.repeat_interleave(x.shape[0] // n)

    def extra_repr(self) -> str:
        """Return the settings shown by ``print(model)``."""
        return f"rows={self.rows}, is_set={self.is_set}"


def step_of(model: nn.Module) -> Step | None:
    """Return the `Step` of `model`; None if none of its quantizers has several rows.

    Raises:
        QuantizationError: parts of `model` were quantized apart and have one each.
    """
    found = [module for module in model.modules() if isinstance(module, Step)]
    if len(found) > 1:
        raise QuantizationError(
            f"the model has {len(found)} independent steps, as its parts were quantized apart: set each part's own"
        )
    return found[0] if found else None


def select_row(model: nn.Module, row: int | Tensor) -> None:
    """Let the quantizers of `model` use `row` from now on; in a loop, keep ``step_of(model)`` and call its `set`.

    Raises:
        QuantizationError: no quantizer of `model` has several rows, or as in `Step.set`.
    """
    step = step_of(model)
    if step is None:
        raise QuantizationError(
            "the model has no activation quantizers with candidate widths or bins to choose from: "
            "quantize it by rules with several activation bits, or several bins"
        )
    step.set(row)


def of_samples(model: nn.Module, rows: Tensor | None) -> AbstractContextManager[None]:
    """Let each sample use its row of `rows` int64 [N], see `Step.each`; None, or a `model` without: no change."""
    step = None if rows is None else step_of(model)
    return nullcontext() if step is None else step.each(rows)
