"""How well each block was reconstructed, on calibration samples that its optimisation did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd


@dataclass(frozen=True)
class BlockError:
    """Error of a quantized block's output against the full-precision network's, on held-out samples.

    Attributes:
        mse: mean squared error over all elements.
        relative: root of `mse` over the root mean square of the full-precision output.
    """

    mse: float
    relative: float


@dataclass(frozen=True)
class LayerRounding:
    """One layer's rounding by GPTQ.

    Attributes:
        layer: name within its block.
        before, after: squared error of its output, tr(E H E^T) per input (token or position), of the nearest rounding
            and of the one in force; None without a Hessian.
        damping: of the Hessian, in the end.
        inputs: how many there were.
        note: why the layer keeps its nearest rounding; "" where it does not.
    """

    layer: str
    before: float | None = None
    after: float | None = None
    damping: float | None = None
    inputs: int = 0
    note: str = ""


@dataclass(frozen=True)
class BlockReport:
    """One block, before (nearest rounding, calibrated step sizes) and after its optimisation.

    Attributes:
        index, name: position in execution order, and name of the module.
        layers: how many quantized weights it has.
        weights: elements of these.
        changed: share of the weights that are not at the nearest level, as kept.
        kept: whether the optimised solution is in force; False = it was worse on `before_quantized`'s inputs, and the
            block is as before.
        before_fp, after_fp: on the inputs of the full-precision network; `after`: of the optimised solution, kept or
            not.
        before_quantized, after_quantized: on the inputs that the quantized network gives, predecessors reconstructed.
        loss: mean of the loss over the last tenth of the iterations, without the regulariser.
        iterations: of the optimiser.
        seconds: wall time, with the capture of inputs.
        details: of each layer, where they were rounded one after the other (GPTQ).
    """

    index: int
    name: str
    layers: int
    weights: int
    changed: float
    kept: bool
    before_fp: BlockError
    after_fp: BlockError
    before_quantized: BlockError
    after_quantized: BlockError
    loss: float
    iterations: int
    seconds: float
    details: tuple[LayerRounding, ...] = ()

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dictionaries (JSON); without `details` where there are none."""
        plain = asdict(self)
        details = plain.pop("details")
        return plain | {"details": list(details)} if details else plain

    @classmethod
    def from_dict(cls, plain: dict) -> BlockReport:
        """Return the report that `to_dict` gave."""
        errors = {key: BlockError(**value) for key, value in plain.items() if isinstance(value, dict)}
        details = tuple(LayerRounding(**detail) for detail in plain.get("details", ()))
        return cls(**plain | errors | {"details": details})


def table(reports: Sequence[BlockReport]) -> pd.DataFrame:
    """One line per block in execution order; errors in columns such as ``before_fp.mse``."""
    return pd.json_normalize([report.to_dict() for report in reports])


def summary(reports: Sequence[BlockReport]) -> dict:
    """Summarise all blocks of a run: numbers of blocks, mean relative errors of what is in force, seconds.

    Of GPTQ also `objective`: squared error of a layer's output over that of its nearest rounding, mean over layers.
    """
    if not reports:
        return {"blocks": 0}
    n = len(reports)
    rounded = [detail for report in reports if report.kept for detail in report.details if detail.before]
    objective = {"objective": sum(d.after / d.before for d in rounded) / len(rounded)} if rounded else {}
    in_force = [(r.after_fp, r.after_quantized) if r.kept else (r.before_fp, r.before_quantized) for r in reports]
    return {
        "blocks": n,
        "kept": sum(report.kept for report in reports),
        "changed": sum(r.changed * r.weights for r in reports) / sum(r.weights for r in reports),
        "error_fp_before": sum(r.before_fp.relative for r in reports) / n,
        "error_fp": sum(fp.relative for fp, _ in in_force) / n,
        "error_before": sum(r.before_quantized.relative for r in reports) / n,
        "error": sum(quantized.relative for _, quantized in in_force) / n,
        "optimiser_seconds": sum(r.seconds for r in reports),
    } | objective
