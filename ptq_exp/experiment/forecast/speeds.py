"""How long the parts of a run take on this machine now: one evaluation, one weight, one range, one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

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
from ptq_exp.experiment.forecast.engine import Engine, engine_of
from ptq_exp.experiment.forecast.pairs import images_of_noise
from ptq_exp.experiment.forecast.pipelines import Zeros
from ptq_exp.experiment.forecast.probe import BUDGET, Line, line, measured
from ptq_exp.experiment.forecast.transforms import TransformTime, between, transform_time
from ptq_exp.experiment.forecast.work import EXECUTED, FULL, OBSERVED, QUANTIZED
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization import (
    ActivationQuantizer,
    Report,
    Rule,
    Transform,
    WeightQuantizer,
    calibrating,
    freeze_weights_,
    quantizers,
    select_row,
)
from ptq_exp.settings.schema_machine import RuntimeConfig

_QUICK = "minmax"  # the range search of what is not timed
_WEIGHTS, _RANGES = 2 * BUDGET, 6  # seconds for weights, of every shape one, and how many activations are timed
_SHOWN = 4  # samples that a place of a transform is fitted on
_RESAMPLES = 8  # of scores, at most, that are timed
_LARGEST = 4_000_000  # values of a weight that is timed


@dataclass
class Placed:
    """The quantized network that a plan makes, with ranges of noise: as fast and as large as the calibrated one.

    Attributes:
        weights: seconds of the range search of all weights.
        ranges: seconds of the range search of all activations, of all bins.
        transforms: what was measured of each.
    """

    network: nn.Module
    report: Report
    weights: float
    ranges: float
    observed: Line
    transforms: tuple[TransformTime, ...] = ()


class Speeds:
    """Measured speeds of one run, each when it is first asked for.

    Args:
        run: its objects.
        plan: how its network is quantized; None = it is not.
        sizes: most samples at once of each network.
        runtime: what executes the quantized network.
        compiles: compile the network to time its engine, which takes tens of seconds.
    """

    def __init__(
        self, run: Run, plan: Plan | None, sizes: dict[str, int], runtime: RuntimeConfig | None = None, *,
        compiles: bool = True,
    ) -> None:
        self.run, self.plan, self.sizes, self.runtime = run, plan, sizes, runtime or RuntimeConfig()
        self.compiles = compiles
        self._generator = torch.Generator().manual_seed(0)

    def of(self, network: str) -> Line:
        """Return the speed of an evaluation of FULL, QUANTIZED, OBSERVED or EXECUTED."""
        if network == EXECUTED:
            return self.engine.speed
        return self.placed.observed if network == OBSERVED else self.full if network == FULL else self.quantized

    @property
    def rows(self) -> float:
        """Rows of one call of the network for each image that is drawn; those of guidance count in its speed."""
        return self.run.model.copies / self.run.model.calls if isinstance(self.run.model, PipelineModel) else 1.0

    @property
    def halves(self) -> int:
        """Rows that calibration sees of each state: with its conditions and, under guidance of our own, without."""
        return 2 if self.run.guidance_scale != 1 and not isinstance(self.run.model, PipelineModel) else 1

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
    def engine(self) -> Engine:
        """The engine that draws, or is measured."""
        return engine_of(self.run, self.model(), self.runtime, self.call(self.sizes[EXECUTED]))

    @cached_property
    def decoded(self) -> Line:
        """The speed of the first stage, or of a pipeline without its network; nothing where states are images."""
        model = self.run.model
        if isinstance(model, PipelineModel):
            draw = partial(model.run, Zeros(model), self.run.grid, seed=0, device=self.run.device)
            return line(lambda n: draw(range(n)), max(1, int(self.sizes[FULL] / self.rows)), self.run.device)
        if self.run.model.first_stage is None:
            return Line(0.0, 0.0)
        return line(lambda n: self.run.model.decode(self.call(n).x), self.sizes[FULL], self.run.device)

    @cached_property
    def placed(self) -> Placed:
        """The quantized network; see `Placed`."""
        transforms: list[TransformTime] = []
        network, report = planned_network(self.run, self.plan, lambda *of: transforms.append(self._transform(*of)))
        if report.candidates > 1:  # how often each is used is not known yet
            report = report.mixed([1 / report.candidates] * report.candidates)
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
        observed = observed or Line(0.0, 0.0)
        return Placed(network, report, weights, ranges * self.plan.n_bins, observed, tuple(transforms))

    @cached_property
    def features(self) -> Line:
        """The speed of the feature extractor."""
        run = self.run
        return line(lambda n: extract_features(run.extractor, images_of_noise(run, n)), FEATURE_BATCH, run.device)

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
        return self.run.noise(n, self._generator)

    def calibration_set(self, n: int) -> CalibrationSet:
        """Return `n` states of noise, spread over the sampling steps."""
        steps = torch.linspace(0, len(self.run.grid) - 1, n).long()
        return CalibrationSet.of(self.call(n)._replace(t=self.run.grid.network_time(steps)), steps)

    def _line(self, network: Callable[..., object], which: str) -> Line:
        calls: dict[int, Call] = {}

        @torch.no_grad()
        def evaluate(n: int) -> None:
            calls.setdefault(n, self.call(n)).evaluate(network)

        return line(evaluate, self.sizes[which], self.run.device)

    def _transform(
        self, network: nn.Module, transform: Transform, sites: dict[str, tuple[str, ...]], rules: list[Rule]
    ) -> TransformTime:
        few = self.call(min(self.sizes[OBSERVED], _SHOWN))
        return transform_time(
            network, transform, sites, rules, few.evaluate, lambda shown: self._line(shown, OBSERVED), self.run.device
        )

    @torch.no_grad()
    def _weights(self, network: nn.Module) -> float:
        """Give all weights ranges and freeze them; returns the seconds that the plan's search takes for them."""
        layers = [m for m in network.modules() if isinstance(getattr(m, "weight_quantizer", None), WeightQuantizer)]
        shapes: dict[tuple[int, ...], list[nn.Module]] = {}
        for layer in sorted(layers, key=lambda layer: layer.weight.numel()):
            shapes.setdefault(tuple(layer.weight.shape), []).append(layer)
        small = [alike for alike in shapes.values() if alike[0].weight.numel() <= _LARGEST] or [*shapes.values()][:1]
        timed: dict[tuple[int, ...], float] = {}
        for first, *_ in sorted(small, key=lambda alike: -len(alike) * alike[0].weight.numel() ** 0.5):
            if sum(timed.values()) < _WEIGHTS:
                search = partial(first.weight_quantizer.search, first.weight, self.plan.metric)
                timed[tuple(first.weight.shape)], _ = measured(search, self.run.device)
        for layer in layers:
            if not layer.weight_quantizer.ready:
                layer.weight_quantizer.search(layer.weight, _QUICK)
        freeze_weights_(network)
        sizes = {math.prod(shape): seconds for shape, seconds in timed.items()}
        return sum(timed.get(tuple(m.weight.shape), between(sizes, m.weight.numel())) for m in layers)

    def _ranges(self, activations: list[ActivationQuantizer], *, timed: bool) -> float:
        """Give all activations ranges of what they saw; returns the seconds that the plan's search takes for them."""
        chosen = activations[:: max(1, len(activations) // _RANGES)] if timed else []
        seconds = [measured(partial(each.finish, self.plan.metric), self.run.device)[0] for each in chosen]
        for quantizer in activations:
            if quantizer.saw_data:
                quantizer.finish(_QUICK)
        return len(activations) * sum(seconds) / len(seconds) if seconds else 0.0

    @cached_property
    def _seen(self) -> FeatureStatistics:
        return extract_features(self.run.extractor, images_of_noise(self.run, FEATURE_BATCH))

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
