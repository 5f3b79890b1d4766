"""`ActivationQuantizer`: ranges found from the data that passes, and which row of them is in force."""

from __future__ import annotations

from torch import Tensor

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.affine import QRange
from ptq_exp.quantization.quantizer.base import Mode, Quantizer, columns
from ptq_exp.quantization.quantizer.time_step import Step
from ptq_exp.quantization.ranges.range_search import RangeSketch


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
        return super().forward(x, self.step.index(x, self.name))

    def off_grid(self, x: Tensor, row: Tensor | None = None) -> int:
        """As `Quantizer.off_grid`, of the row in force."""
        return super().off_grid(x, row if self.step is None else self.step.index(x, self.name))

    @property
    def needs_data(self) -> bool:
        """Whether ranges have to be found from data; if not, `observe` and `finish` do nothing."""
        return True

    @property
    def saw_data(self) -> bool:
        """Whether values passed, in each segment, in mode ``observe`` since the last `finish` or `forget`.

        True where no data is needed.
        """
        sketches = [sketch for bin_sketches in self._sketches.values() for sketch in bin_sketches]
        return not self.needs_data or (bool(sketches) and all(int(sketch.count) > 0 for sketch in sketches))

    def observe(self, x: Tensor) -> None:
        """Feed `x`, of any shape with the channels on `axis`, to the sketches (of the bin in force).

        Raises:
            PTQError: `x` holds NaN or infinity; the message names the layer.
            QuantizationError: there are several bins and none was chosen, or one for each sample.
        """
        if not self.needs_data:
            return
        parts, row = self.split(x.detach()), 0
        if self.bins > 1:
            self._require_row()
            if len(self.step.row) > 1:
                raise QuantizationError(f"{self.name}: ranges are found bin by bin: show it the samples of one only")
            row = int(self.step.row)
        if row not in self._sketches:
            self._sketches[row] = [RangeSketch(1, name=self.name, device=x.device) for _ in parts]
        for sketch, part in zip(self._sketches[row], parts, strict=True):
            sketch.update(part.reshape(1, -1))

    def finish(self, metric: str) -> None:
        """Search the ranges that minimise `metric` (or the quantizer's own) over all observed data.

        Bins that saw nothing are left as they are; the quantizer is calibrated when each has had its turn.

        Raises:
            QuantizationError: no data was observed.
        """
        if not self.needs_data:
            return
        if not self.saw_data:
            raise QuantizationError(f"{self.name}: saw no data during calibration")
        for bin_, sketches in sorted(self._sketches.items()):
            for row, bits in enumerate(self.widths, start=bin_):
                found = [self.found(sketch, bits, self.metric or metric) for sketch in sketches]
                found = [qrange._replace(scale=qrange.scale * self.headroom) for qrange in found]
                for field, value in columns(found, rows=1)._asdict().items():
                    getattr(self, field)[row].copy_(value[0])
            self._missing.discard(bin_)
        if not self._missing:
            self.set_ready()
        self.forget()

    def found(self, sketch: RangeSketch, bits: int, metric: str) -> QRange:
        """Return the range that the search finds for what a sketch saw, at a width."""
        return sketch.search(bits, self.symmetric, metric)

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
