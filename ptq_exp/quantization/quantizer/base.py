"""The one quantizer shape that every method shares.

A quantizer holds four buffers, ``scale``, ``zero_point``, ``qmin`` and ``qmax``, of shape ``[rows,
segments]``:

* rows: bins of sampling steps, or candidate widths, of an activation; each sampling step uses one of them (1 = the
  same for all steps); output channels of a weight (1 = per tensor);
* segments: contiguous groups of input channels with a range of their own (1 = all channels together).

The simulated integer is ``clamp(round(x / scale) + zero_point, qmin, qmax)``, see
`ptq_exp.quantization.affine`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.affine import QRange, fake_quantize


class Mode(StrEnum):
    """What a quantizer does to the tensor that passes it; the tensor is unchanged in the first two."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


_MODES = {mode.value: mode for mode in Mode}


class Quantizer(nn.Module):
    """Fake-quantizes a tensor with ranges kept as buffers, so that they travel with the state dict.

    Args:
        bits: width of the integer (several for an `ActivationQuantizer`).
        symmetric: zero point 0 (signed integers, or unsigned ones for a tensor that is nowhere negative).
        rows: number of ranges along the first dimension of the buffers.
        axis: channel dimension of the tensor, negative (-1 for ``[..., C]``, -3 for ``[..., C, H, W]``).
        segments: channel counts of the groups along `axis`; None = one range for all channels.
        metric: error measure of this quantizer's range search; None = the one of the run.
        name: module name used in error messages.
    """

    # Whether scales follow the data, so that values are looked at where they are quantized.
    dynamic = False
    # Names of further buffers that hold scales, beside those of `QRange`.
    scale_names: tuple[str, ...] = ()

    def __init__(
        self,
        bits: int | tuple[int, ...],
        *,
        symmetric: bool,
        rows: int = 1,
        axis: int = -1,
        segments: tuple[int, ...] | None = None,
        metric: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.axis, self.segments = bits, symmetric, axis, segments
        self.metric, self.name, self.mode = metric, name, Mode.QUANTIZE
        # While a block is reconstructed: which elements of x stay as they are, see `fake_quantize`.
        self.kept: Callable[[Tensor], Tensor] | None = None
        shape = (rows, len(segments) if segments else 1)
        for buffer in QRange._fields:
            self.register_buffer(buffer, torch.zeros(shape))
        self.register_buffer("calibrated", torch.tensor(False))
        # Mirrors `calibrated`: reading a buffer on a GPU at every forward would wait for the device.
        self.ready = False
        if segments:
            owner = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
            self.register_buffer("segment_of_channel", owner, persistent=False)

    @property
    def mode(self) -> Mode:
        """What is done to the tensor that passes."""
        # kept as a string: torch.compile does not see that an attribute has become another member of an enumeration,
        # where it met the first one by its global name
        return _MODES[self._mode]

    @mode.setter
    def mode(self, mode: Mode | str) -> None:
        self._mode = Mode(mode).value

    def forward(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        """Return `x` on the integer grid (same shape, multiples of ``scale``), or `x` itself when off.

        Args:
            x: floating point, with the channels on `axis`.
            row: index of the row of the buffers to use, int64 [1], or one for each index of the first axis of `x`, [N];
                None = the only one, or all in the order of the first axis.

        Raises:
            QuantizationError: the ranges were neither calibrated nor loaded.
        """
        if self.mode == Mode.OFF:
            return x
        if not self.ready:
            raise QuantizationError(
                f"{self.name}: not calibrated, it cannot quantize; calibrate the model or load its state dict"
            )
        return self.rounded(x, row, None if self.kept is None else self.kept(x))

    def rounded(self, x: Tensor, row: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Return `x` on the grid; `row` as in `forward`, `kept` as in `fake_quantize`."""
        # ranges that are no 0-d tensors are float32, which would win over the bfloat16 of x
        return fake_quantize(x, *self.cells(x, row), kept).to(x.dtype)

    def cells(self, x: Tensor, row: Tensor | None = None) -> QRange:
        """Return the range of each element of `x`, in shapes that broadcast against it; `row` as in `forward`."""
        return QRange(*(self._aligned(getattr(self, field), x, row) for field in QRange._fields))

    def set_range(self, qrange: QRange) -> None:
        """Copy a range into the buffers; each field broadcasts to ``[rows, segments]``."""
        for field, value in qrange._asdict().items():
            buffer = getattr(self, field)
            buffer.copy_(torch.as_tensor(value).expand(buffer.shape))
        self.set_ready()

    def set_ready(self) -> None:
        """Note that all ranges are there."""
        self.calibrated.fill_(True)
        self.ready = True

    @torch.no_grad()
    def off_grid(self, x: Tensor, row: Tensor | None = None) -> int:
        """Count the elements of `x` that are no level of their range, to the rounding of its type; see `forward`.

        NaN is no level.
        """
        return off_levels(x, self.cells(x, row))

    def returned_off_grid(self, x: Tensor, y: Tensor) -> int:
        """Count the elements of `y`, returned for `x` and laid out as it, that are no level of their range."""
        return self.off_grid(y)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the segments of `x` along the channel axis (the whole of it when there is one segment)."""
        return x.split(self.segments, dim=self.axis) if self.segments else (x,)

    def extra_repr(self) -> str:
        """Return the settings shown by ``print(model)``."""
        return (
            f"bits={self.bits}, symmetric={self.symmetric}, segments={self.segments}, "
            f"mode={self.mode.value}, calibrated={self.ready}"
        )

    def _aligned(self, cells: Tensor, x: Tensor, row: Tensor | None) -> Tensor:
        """Reshape a ``[rows, segments]`` buffer, or the `row` or rows of it, so that it broadcasts against `x`."""
        if row is not None:
            cells = cells.index_select(0, row)
        if cells.numel() == 1:
            return cells.reshape(())  # 0-d: the cheapest broadcast, and it leaves the dtype of x alone
        if self.segments:
            cells = cells.index_select(1, self.segment_of_channel)
        shape = [1] * x.ndim
        shape[0] = cells.shape[0]
        shape[self.axis] = cells.shape[1]
        return cells.reshape(shape)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = bool(self.calibrated)


def columns(ranges: list[QRange], rows: int) -> QRange:
    """Stack one range per segment, each of `rows` values (or one) in any shape, to ``[rows, segments]``."""
    fields = zip(*ranges, strict=True)
    return QRange(
        *(
            torch.cat([torch.as_tensor(v).reshape(-1, 1).expand(rows, 1) for v in field], dim=1)
            for field in fields
        )
    )


def off_levels(x: Tensor, cells: QRange) -> int:
    """Count the elements of `x` that are no level of `cells`, which broadcast against it; see `Quantizer.off_grid`."""
    scale, zero_point, qmin, qmax = cells
    if torch.equal(fake_quantize(x, scale, zero_point, qmin, qmax).to(x.dtype), x):
        return 0
    # as `fake_quantize` multiplies: a 0-d scale takes the type of x
    kind = torch.promote_types(x.dtype, scale.dtype) if scale.ndim else x.dtype
    step = scale.to(kind).double()
    lowest, highest = (qmin - zero_point).double(), (qmax - zero_point).double()
    ratio, on = x.double() / step, torch.zeros_like(x, dtype=torch.bool)
    for shift in (0, -1, 1):  # in 16-bit types two levels can be one number
        level = ratio.round().add_(shift).clamp_(lowest, highest)
        on |= level.to(kind).mul_(scale).to(x.dtype) == x
        on |= level.float().mul_(scale).to(x.dtype) == x  # a learned rounding multiplies before it rounds
    # where levels lie closer than the numbers of the type, each of these is one
    within = (ratio >= lowest - 1) & (ratio <= highest + 1)
    on |= within & (step <= torch.finfo(x.dtype).eps * x.double().abs())
    return x.numel() - int(on.sum())
