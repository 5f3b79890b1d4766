"""How long the parts of a run take on this machine now: one evaluation, one weight, one range, one optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.evaluation import change_intervals, extract_features
from ptq_exp.evaluation.scores import score
from ptq_exp.evaluation.statistics import FeatureStatistics
from ptq_exp.experiment.budget import planned_network
from ptq_exp.experiment.features import FEATURE_BATCH
from ptq_exp.experiment.forecast.probe import BUDGET, Line, line, measured
from ptq_exp.experiment.forecast.work import FULL, OBSERVED, QUANTIZED
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import (
    ActivationQuantizer,
    Report,
    WeightQuantizer,
    calibrating,
    freeze_weights_,
    quantizers,
    select_row,
)

_QUICK = "minmax"  # the range search of what is not timed
_WEIGHTS, _RANGES = 4, 6  # that are timed
_RESAMPLES = 8  # of scores, at most, that are timed
_LARGEST = 4_000_000  # values of a weight that is timed


@dataclass
class Placed:
    """The quantized network that a plan makes, with ranges of noise: as fast and as large as the calibrated one.

    Attributes:
        weights: seconds of the range search of all weights.
        ranges: seconds of the range search of all activations, of all bins.
    """

    network: nn.Module
    report: Report
    weights: float
    ranges: float
    observed: Line


class Speeds:
    """Measured speeds of one run, each when it is first asked for.

    Args:
        run: its objects.
        plan: how its network is quantized; None = it is not.
        sizes: most samples at once of each network.
    """

    def __init__(self, run: Run, plan: Plan | None, sizes: dict[str, int]) -> None:
        self.run, self.plan, self.sizes = run, plan, sizes
        self._generator = torch.Generator().manual_seed(0)

    def of(self, network: str) -> Line:
        """Return the speed of an evaluation of FULL, QUANTIZED or OBSERVED."""
        return {FULL: lambda: self.full, QUANTIZED: lambda: self.quantized, OBSERVED: lambda: self.placed.observed}[
            network
        ]()

    @cached_property
    def full(self) -> Line:
        """The speed of the guided network in full precision."""
        self.run.model.denoiser.to(self.run.device)
        return self._line(self.run.full_precision, FULL)

    @cached_property
    def quantized(self) -> Line:
        """The speed of the guided, simulated quantized network."""
        if self.plan.n_bins > 1 or len(self.plan.widths) > 1:
            select_row(self.placed.network, 0)
        return self._line(self.run.model.guided(self.placed.network, self.run.guidance_scale), QUANTIZED)

    @cached_property
    def decoded(self) -> Line:
        """The speed of the first stage; nothing where states are images."""
        if self.run.model.first_stage is None:
            return Line(0.0, 0.0)
        return line(lambda n: self.run.model.decode(self.call(n).x), self.sizes[FULL], self.run.device)

    @cached_property
    def placed(self) -> Placed:
        """The quantized network; see `Placed`."""
        network, report = planned_network(self.run, self.plan)
        weights = self._weights(network)
        observed, ranges = None, 0.0
        activations = [q for _, q in quantizers(network) if isinstance(q, ActivationQuantizer) and q.needs_data]
        for row in range(self.plan.n_bins if activations else 0):
            if self.plan.n_bins > 1:
                select_row(network, row)
            with calibrating(network), torch.no_grad():
                if row == 0:
                    observed = self._line(network, OBSERVED)
                self.call(1).evaluate(network)
            ranges += self._ranges(activations, timed=row == 0)
        return Placed(network, report, weights, ranges * self.plan.n_bins, observed or Line(0.0, 0.0))

    @cached_property
    def features(self) -> Line:
        """The speed of the feature extractor."""
        return line(lambda n: extract_features(self.run.extractor, self._images(n)), FEATURE_BATCH, self.run.device)

    def scored(self, n: int, real: int) -> float:
        """Return the seconds of scoring `n` images against `real` ones."""
        ours, theirs = (self._features(min(m, 512)) for m in (n, real or n))
        seconds, _ = measured(lambda: score(ours, theirs), torch.device("cpu"))
        pairs = n * (real or n) / (len(ours) * len(theirs))  # precision and recall compare all with all
        return seconds * max(1.0, pairs)

    def resampled(self, n: int, resamples: int) -> float:
        """Return the seconds of the intervals of FID, sFID and IS."""
        if not resamples:
            return 0.0
        ours = self._features(n)
        wanted = {"fid_increase": 0.0, "sfid_increase": 0.0, "is_increase": 0.0}
        real = self._features(2 * n)
        seconds = line(lambda tried: change_intervals(ours, ours, real, wanted, resamples=tried), _RESAMPLES,
                       torch.device("cpu"))
        return seconds.seconds(resamples)

    def call(self, n: int) -> Call:
        """Return a call of `n` samples of noise."""
        call = self.run.example().expanded(n)
        x = torch.randn(call.x.shape, generator=self._generator).to(call.x)
        return call.mapped(torch.Tensor.contiguous)._replace(x=x)

    def calibration_set(self, n: int) -> CalibrationSet:
        """Return `n` states of noise, spread over the sampling steps."""
        call, steps = self.call(n), torch.linspace(0, len(self.run.grid) - 1, n).long()
        times = self.run.grid.network_time(steps)
        conditions = {name: value.cpu().numpy() for name, value in call.conditions.items()}
        return CalibrationSet(call.x.cpu().float().numpy(), steps.numpy(), times.float().numpy(), steps.numpy(),
                              conditions)

    def _line(self, network: Callable[..., object], which: str) -> Line:
        calls: dict[int, Call] = {}

        @torch.no_grad()
        def evaluate(n: int) -> None:
            calls.setdefault(n, self.call(n)).evaluate(network)

        return line(evaluate, self.sizes[which], self.run.device)

    @torch.no_grad()
    def _weights(self, network: nn.Module) -> float:
        """Give all weights ranges and freeze them; returns the seconds that the plan's search takes for them."""
        layers = [m for m in network.modules() if isinstance(getattr(m, "weight_quantizer", None), WeightQuantizer)]
        layers.sort(key=lambda layer: layer.weight.numel())
        small = [layer for layer in layers if layer.weight.numel() <= _LARGEST] or layers[:1]
        places = {round(k * (len(small) - 1) / (_WEIGHTS - 1)) for k in range(_WEIGHTS)} if small else set()
        timed = {}
        for place, layer in enumerate(small):
            if place in places and sum(timed.values()) < BUDGET:
                timed[layer.weight.numel()] = self._seconds(
                    lambda layer=layer: layer.weight_quantizer.search(layer.weight, self.plan.metric)
                )
        for layer in layers:
            if not layer.weight_quantizer.ready:
                layer.weight_quantizer.search(layer.weight, _QUICK)
        freeze_weights_(network)
        return sum(_between(timed, layer.weight.numel()) for layer in layers)

    def _ranges(self, activations: list[ActivationQuantizer], *, timed: bool) -> float:
        """Give all activations ranges of what they saw; returns the seconds that the plan's search takes for them."""
        chosen = activations[:: max(1, len(activations) // _RANGES)] if timed else []
        seconds = [self._seconds(lambda each=each: each.finish(self.plan.metric)) for each in chosen]
        for quantizer in activations:
            if quantizer.saw_data:
                quantizer.finish(_QUICK)
        return len(activations) * sum(seconds) / len(seconds) if seconds else 0.0

    def _seconds(self, work: Callable[[], object]) -> float:
        return measured(work, self.run.device)[0]

    def _images(self, n: int) -> np.ndarray:
        channels, height, width = self.run.model.image_shape
        return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)

    @cached_property
    def _seen(self) -> FeatureStatistics:
        return extract_features(self.run.extractor, self._images(FEATURE_BATCH))

    def _features(self, n: int) -> FeatureStatistics:
        """Return features of `n` images that were never drawn: mixtures of those of noise."""
        draw = np.random.default_rng(n)
        mix = draw.dirichlet(np.ones(len(self._seen)), n).astype(np.float32)
        mixed = {name: mix @ getattr(self._seen, name) for name in ("pooled", "spatial", "probabilities")}
        return replace(self._seen, **mixed)

    def model(self) -> QuantizedModel:
        """Return the network as the quantized model that the run will have."""
        run, plan, bins = self.run, self.plan, self.plan.time_bins if self.plan.n_bins > 1 else None
        return QuantizedModel(run.model, self.placed.network, self.placed.report, run.grid, run.guidance_scale,
                              widths=tuple(plan.widths), time_bins=bins)


def _between(timed: dict[int, float], size: int) -> float:
    """Return the seconds of a weight of `size` values: between the sizes that were timed, in proportion beyond them."""
    if not timed:
        return 0.0
    sizes = sorted(timed)
    if size > sizes[-1]:
        return timed[sizes[-1]] * size / sizes[-1]
    return float(np.interp(size, sizes, [timed[known] for known in sizes]))
