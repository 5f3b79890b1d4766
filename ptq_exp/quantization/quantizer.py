"""The one quantizer shape that every method shares.

A quantizer holds four buffers, ``scale``, ``zero_point``, ``qmin`` and ``qmax``, of shape ``[rows,
segments]``:

* rows: candidate widths of an activation, of which each sampling step uses one (1 = one width for all steps);
  output channels of a weight (1 = per tensor);
* segments: contiguous groups of input channels with a range of their own (1 = all channels together).

The simulated integer is ``clamp(round(x / scale) + zero_point, qmin, qmax)``, see
`ptq_exp.quantization.affine`.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.affine import QRange, fake_quantize
from ptq_exp.quantization.ranges import RangeSketch, search_range
from ptq_exp.quantization.step import Step


class Mode(StrEnum):
    """What a quantizer does to the tensor that passes it; the tensor is unchanged in the first two."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


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
        shape = (rows, len(segments) if segments else 1)
        for buffer in QRange._fields:
            self.register_buffer(buffer, torch.zeros(shape))
        self.register_buffer("calibrated", torch.tensor(False))
        # Mirrors `calibrated`: reading a buffer on a GPU at every forward would wait for the device.
        self.ready = False
        if segments:
            owner = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
            self.register_buffer("segment_of_channel", owner, persistent=False)

    def forward(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        """Return `x` on the integer grid (same shape, multiples of ``scale``), or `x` itself when off.

        Args:
            x: floating point, with the channels on `axis`.
            row: index, int64 [1], of the row of the buffers to use; None = the only one, or one for each index of the
                first axis of `x`.

        Raises:
            QuantizationError: the ranges were neither calibrated nor loaded.
        """
        if self.mode == Mode.OFF:
            return x
        if not self.ready:
            raise QuantizationError(
                f"{self.name}: not calibrated, it cannot quantize; calibrate the model or load its state dict"
            )
        return fake_quantize(x, *self.cells(x, row))

    def cells(self, x: Tensor, row: Tensor | None = None) -> QRange:
        """Return the range of each element of `x`, in shapes that broadcast against it; `row` as in `forward`."""
        return QRange(*(self._aligned(getattr(self, field), x, row) for field in QRange._fields))

    def set_range(self, qrange: QRange) -> None:
        """Copy a range into the buffers; each field broadcasts to ``[rows, segments]``."""
        for field, value in qrange._asdict().items():
            buffer = getattr(self, field)
            buffer.copy_(torch.as_tensor(value).expand(buffer.shape))
        self.calibrated.fill_(True)
        self.ready = True

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
        """Reshape a ``[rows, segments]`` buffer, or one `row` of it, so that it broadcasts against `x`."""
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


class ActivationQuantizer(Quantizer):
    """Quantizer of activations: observes any number of batches, then searches its ranges once.

    Buffers ``[widths, segments]``: per candidate width one static range for each segment, `headroom` times as wide as
    the search found. With several widths `step`, which the quantizers of a model share, says which one is in force.
    A sketch of bounded size stands for the observed data; it is no part of the state dict and is dropped by `finish`.

    Args:
        bits: width of the integer, or a tuple of candidate widths, one per row.
        headroom: factor by which the ranges are widened after the search.
        settings: as for `Quantizer`, without `rows`.
    """

    sketches: list[RangeSketch] | None = None

    def __init__(self, bits: int | tuple[int, ...], *, headroom: float = 1.0, **settings) -> None:
        widths = bits if isinstance(bits, tuple) else (bits,)
        super().__init__(bits if len(widths) > 1 else widths[0], rows=len(widths), **settings)
        self.headroom = headroom
        self.step = Step(len(widths)) if len(widths) > 1 else None

    @property
    def widths(self) -> tuple[int, ...]:
        """The candidate widths, one per row of the buffers."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits,)

    def forward(self, x: Tensor) -> Tensor:
        """As `Quantizer.forward`; in mode ``observe`` the sketches are fed and `x` is returned unchanged.

        Raises:
            QuantizationError: also if there are several widths and none was chosen.
        """
        if self.mode == Mode.OBSERVE:
            self.observe(x)
            return x
        if self.step is None or self.mode == Mode.OFF:
            return super().forward(x)
        if not self.step.is_set:
            raise QuantizationError(
                f"{self.name}: has the candidate widths {self.bits} and none was chosen; call select_row(model, row) "
                "before the model"
            )
        return super().forward(x, self.step.row)

    @property
    def saw_data(self) -> bool:
        """Whether values passed, in each segment, in mode ``observe`` since the last `finish` or `forget`."""
        return self.sketches is not None and all(int(sketch.count) > 0 for sketch in self.sketches)

    def observe(self, x: Tensor) -> None:
        """Feed `x`, of any shape with the channels on `axis`, to the sketches.

        Raises:
            PTQError: `x` holds NaN or infinity; the message names the layer.
        """
        parts = self.split(x.detach())
        if self.sketches is None:
            self.sketches = [RangeSketch(1, name=self.name) for _ in parts]
        for sketch, part in zip(self.sketches, parts, strict=True):
            sketch.update(part.reshape(1, -1))

    def finish(self, metric: str) -> None:
        """Search the ranges that minimise `metric` (or the quantizer's own) over all observed data.

        Raises:
            QuantizationError: no data was observed.
        """
        if not self.saw_data:
            raise QuantizationError(f"{self.name}: saw no data during calibration")
        rows = []
        for bits in self.widths:
            found = [sketch.search(bits, self.symmetric, self.metric or metric) for sketch in self.sketches]
            found = [qrange._replace(scale=qrange.scale * self.headroom) for qrange in found]
            rows.append(_columns(found, rows=1))
        self.set_range(QRange(*(torch.cat(field) for field in zip(*rows, strict=True))))
        self.forget()

    def forget(self) -> None:
        """Drop the observed data."""
        self.sketches = None


class WeightQuantizer(Quantizer):
    """Quantizer of a weight ``[out_channels, in_channels / groups, *kernel]``.

    Buffers ``[out_channels, segments]`` (per output channel) or ``[1, segments]`` (per tensor). Once frozen,
    the parameter itself holds the quantized values and the quantizer is the identity.
    """

    def __init__(self, bits: int, **settings) -> None:
        super().__init__(bits, **settings)
        self.register_buffer("frozen", torch.tensor(False))
        self.baked = False  # mirrors `frozen`, as `ready` mirrors `calibrated`

    def forward(self, weight: Tensor) -> Tensor:
        """As `Quantizer.forward`; the identity once the weight is frozen."""
        return weight if self.baked else super().forward(weight)

    @torch.no_grad()
    def search(self, weight: Tensor, metric: str) -> None:
        """Search the ranges that minimise `metric` (or the quantizer's own) over `weight`.

        Raises:
            QuantizationError: the weight is already frozen, i.e. no longer the full-precision one.
            PTQError: `weight` holds NaN or infinity; the message names the layer.
        """
        if self.baked:
            raise QuantizationError(
                f"{self.name}: the weight is already quantized and frozen; "
                "start from the full-precision model to calibrate it again"
            )
        rows = self.scale.shape[0]
        found = [
            search_range(
                part,
                self.bits,
                symmetric=self.symmetric,
                channel_axis=0 if rows > 1 else None,
                metric=self.metric or metric,
                name=self.name,
            )
            for part in self.split(weight)
        ]
        self.set_range(_columns(found, rows))

    @torch.no_grad()
    def freeze(self, weight: nn.Parameter) -> None:
        """Replace the values of `weight` by their quantized ones, once; a frozen weight is left alone."""
        if not self.baked:
            weight.copy_(Quantizer.forward(self, weight))
            self.frozen.fill_(True)
            self.baked = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.baked = bool(self.frozen)


def _columns(ranges: list[QRange], rows: int) -> QRange:
    """Stack one range per segment, each of `rows` values (or one) in any shape, to ``[rows, segments]``."""
    fields = zip(*ranges, strict=True)
    return QRange(
        *(
            torch.cat([torch.as_tensor(v).reshape(-1, 1).expand(rows, 1) for v in field], dim=1)
            for field in fields
        )
    )
