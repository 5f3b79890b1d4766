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


class ActivationQuantizer(Quantizer):
    """Quantizer of activations: observes any number of batches, then searches its ranges once.

    Buffers ``[rows, segments]``: a range for each segment, `headroom` times as wide as the search found, per candidate
    width or per bin of sampling steps. With several rows `step`, which the quantizers of a model share, says which one
    is in force. Candidate widths are calibrated on the same data, a bin on the data that pass while it is in force.
    A sketch of bounded size stands for the observed data; it is no part of the state dict and is dropped by `finish`.

    Args:
        bits: width of the integer, or a tuple of candidate widths, one per row.
        headroom: factor by which the ranges are widened after the search.
        bins: rows of one width; 1 with candidate widths.
        settings: as for `Quantizer`, without `rows`.
    """

    def __init__(self, bits: int | tuple[int, ...], *, headroom: float = 1.0, bins: int = 1, **settings) -> None:
        widths = bits if isinstance(bits, tuple) else (bits,)
        rows = len(widths) * bins
        super().__init__(bits if len(widths) > 1 else widths[0], rows=rows, **settings)
        self.headroom, self.bins = headroom, bins
        self.step = Step(rows) if rows > 1 else None
        # per bin, the sketches of its segments
        self._sketches: dict[int, list[RangeSketch]] = {}
        self._missing = set(range(bins))

    @property
    def widths(self) -> tuple[int, ...]:
        """The candidate widths."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits,)

    def forward(self, x: Tensor) -> Tensor:
        """As `Quantizer.forward`; in mode ``observe`` the sketches are fed and `x` is returned unchanged.

        Raises:
            QuantizationError: also if there are several rows and none was chosen.
        """
        if self.mode == Mode.OBSERVE:
            self.observe(x)
            return x
        if self.step is None or self.mode == Mode.OFF:
            return super().forward(x)
        self._require_row()
        # ranges of each sample are no 0-d tensors: their float32 would win over the bfloat16 of x
        return super().forward(x, self.step.index(x, self.name)).to(x.dtype)

    @property
    def saw_data(self) -> bool:
        """Whether values passed, in each segment, in mode ``observe`` since the last `finish` or `forget`."""
        sketches = [sketch for bin_sketches in self._sketches.values() for sketch in bin_sketches]
        return bool(sketches) and all(int(sketch.count) > 0 for sketch in sketches)

    def observe(self, x: Tensor) -> None:
        """Feed `x`, of any shape with the channels on `axis`, to the sketches (of the bin in force).

        Raises:
            PTQError: `x` holds NaN or infinity; the message names the layer.
            QuantizationError: there are several bins and none was chosen, or one for each sample.
        """
        parts, row = self.split(x.detach()), 0
        if self.bins > 1:
            self._require_row()
            if len(self.step.row) > 1:
                raise QuantizationError(f"{self.name}: ranges are found bin by bin: show it the samples of one only")
            row = int(self.step.row)
        if row not in self._sketches:
            self._sketches[row] = [RangeSketch(1, name=self.name) for _ in parts]
        for sketch, part in zip(self._sketches[row], parts, strict=True):
            sketch.update(part.reshape(1, -1))

    def finish(self, metric: str) -> None:
        """Search the ranges that minimise `metric` (or the quantizer's own) over all observed data.

        Bins that saw nothing are left as they are; the quantizer is calibrated when each has had its turn.

        Raises:
            QuantizationError: no data was observed.
        """
        if not self.saw_data:
            raise QuantizationError(f"{self.name}: saw no data during calibration")
        for bin_, sketches in sorted(self._sketches.items()):
            for row, bits in enumerate(self.widths, start=bin_):
                found = [sketch.search(bits, self.symmetric, self.metric or metric) for sketch in sketches]
                found = [qrange._replace(scale=qrange.scale * self.headroom) for qrange in found]
                for field, value in _columns(found, rows=1)._asdict().items():
                    getattr(self, field)[row].copy_(value[0])
            self._missing.discard(bin_)
        if not self._missing:
            self.calibrated.fill_(True)
            self.ready = True
        self.forget()

    def forget(self) -> None:
        """Drop the observed data."""
        self._sketches = {}

    def _require_row(self) -> None:
        """Raise QuantizationError unless a row was chosen."""
        if not self.step.is_set:
            rows = f"{self.bins} bins of steps" if self.bins > 1 else f"the candidate widths {self.bits}"
            raise QuantizationError(
                f"{self.name}: has {rows} and none was chosen; call select_row(model, row) before the model"
            )


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

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """The integers q - qmin of a frozen `weight`, int32 >= 0 of its shape; `restore` makes the same weight of them.

        Raises:
            QuantizationError: the weight is not frozen, or not exactly on the grid of its ranges.
        """
        if not self.baked:
            raise QuantizationError(f"{self.name}: the weight is not frozen and has no integers; calibrate it first")
        scale, lowest, highest = self._levels(weight)
        nearest = torch.div(weight, scale).round_().float()
        found = torch.zeros_like(weight, dtype=torch.int32)
        left = torch.ones_like(weight, dtype=torch.bool)
        # in 16-bit types a quotient can be off by one, and two levels can be one number: any that gives it will do
        for shift in (0, -1, 1):
            integers = ((nearest + shift).clamp_(lowest, highest) - lowest).to(torch.int32)
            same = left & (self._values(integers, weight) == weight)
            found = torch.where(same, integers, found)
            left &= ~same
        if bool(left.any()):
            raise QuantizationError(
                f"{self.name}: {int(left.sum())} of {left.numel()} weights are not on the grid of their ranges: they "
                "were changed after they had been quantized"
            )
        return found

    @torch.no_grad()
    def restore(self, weight: nn.Parameter, integers: Tensor) -> None:
        """Fill and freeze `weight` with what `integers` took from a weight with the same ranges."""
        weight.copy_(self._values(integers.to(weight.device), weight))
        self.frozen.fill_(True)
        self.baked = True

    def _values(self, integers: Tensor, like: Tensor) -> Tensor:
        """What `integers` stand for, in the type of the weight `like` and by the arithmetic of `fake_quantize`."""
        scale, lowest, _ = self._levels(like)
        # a 0-d scale leaves the type of the weight alone, as it does there
        kind = torch.promote_types(like.dtype, scale.dtype) if scale.ndim else like.dtype
        return (integers + lowest).to(kind).mul_(scale).to(like.dtype)

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, lowest and highest level (counted from the zero point), each broadcasting against `weight`."""
        scale, zero_point, qmin, qmax = (self._aligned(getattr(self, f), weight, None) for f in QRange._fields)
        return scale, qmin - zero_point, qmax - zero_point

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
