"""How long the parts of a run take on this machine now: one evaluation, one weight, one range, one optimiser step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.budget import planned_network
from ptq_exp.experiment.forecast.engine import Engine, engine_of
from ptq_exp.experiment.forecast.first_blocks import FirstBlocks
from ptq_exp.experiment.forecast.free_memory import available_memory
from ptq_exp.experiment.forecast.pipelines import Zeros
from ptq_exp.experiment.forecast.placed import Placed, give_ranges_, give_weights_ranges_
from ptq_exp.experiment.forecast.probe import Line, line, measured
from ptq_exp.experiment.forecast.saving import saving_seconds
from ptq_exp.experiment.forecast.scoring import Scoring
from ptq_exp.experiment.forecast.transforms import TransformTime, transform_time
from ptq_exp.experiment.forecast.work import EXECUTED, FULL, OBSERVED, QUANTIZED
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import PARTS, Run
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization import (
    ActivationQuantizer,
    Report,
    Rule,
    Transform,
    calibrating,
    freeze_weights_,
    quantizers,
    select_row,
)
from ptq_exp.quantization.offload import weight_bytes
from ptq_exp.settings.schema_machine import RuntimeConfig

_SHOWN = 4  # samples that a place of a transform is fitted on


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
        self.scoring = Scoring(run)
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
        network = self.run.model.denoiser
        found = self._line(network, FULL, self.run.full_precision)
        return found if self.first is None else self._whole(found, self.plan and self.placed.report)

    @cached_property
    def quantized(self) -> Line:
        """The speed of the guided, simulated quantized network."""
        if self.plan.n_bins > 1 or len(self.plan.widths) > 1:
            select_row(self.placed.network, 0)
        network = self.placed.network
        found = self._line(network, QUANTIZED, self.run.model.guided(network, self.run.guidance_scale))
        return self._whole(found, self.placed.report)

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
        fitted: list[float] = []

        def look(*of) -> None:
            begun = time.perf_counter()
            transforms.append(self._transform(*of))
            fitted.append(time.perf_counter() - begun)

        started = time.perf_counter()
        network, report = planned_network(self.run, self.plan, look)
        placing = time.perf_counter() - started - sum(fitted) if self.run.blockwise else 0.0
        if report.candidates > 1:  # how often each is used is not known yet
            report = report.mixed([1 / report.candidates] * report.candidates)
        plan = cast("Plan", self.plan)  # there is one where something is quantized
        weights, (observed, ranges) = self._weights(network, plan), self._activations(network, plan)
        each = (replace(found, each=self._whole(found.each, report)) for found in transforms)
        return Placed(network, report, weights, ranges, self._whole(observed, report), tuple(each), placing)

    def _weights(self, network: nn.Module, plan: Plan) -> float:
        """Give weights ranges, and round them; returns the seconds of all of them."""
        first, device = self.first, self.run.device
        anew = first.used_anew if first else lambda module: None
        searched = give_weights_ranges_(network, plan.metric, device, first and first.behind, anew)
        part = network if first is None else first.part(network)
        rounded, _ = measured(partial(freeze_weights_, part), device, before=partial(anew, part))
        return searched + rounded * weight_bytes(network) / weight_bytes(part)

    def _activations(self, network: nn.Module, plan: Plan) -> tuple[Line, float]:
        """Give activations ranges of noise; returns how fast they are observed, and the seconds of all searches."""
        observed, ranges = Line(0.0, 0.0), 0.0
        activations = [q for _, q in quantizers(network) if isinstance(q, ActivationQuantizer) and q.needs_data]
        for row in range(plan.n_bins if activations else 0):
            if plan.n_bins > 1:
                select_row(network, row)
            with calibrating(network), torch.no_grad():
                if row == 0:
                    observed = self._line(network, OBSERVED)
                self._evaluate(network, self.call(1))
            ranges += give_ranges_(activations, plan.metric, self.run.device, timed=row == 0)
        return observed, ranges * plan.n_bins

    @cached_property
    def first(self) -> FirstBlocks | None:
        """The blocks that are timed of a network in files; None = all of it is."""
        run, network = self.run, self.run.model.denoiser
        if not run.blockwise:
            return None
        room = available_memory()
        from_disk = room is not None and room < 2 * weight_bytes(network)  # the files of both networks
        return FirstBlocks(network, run.model.blocks, partial(self.call(1).evaluate, network), from_disk=from_disk)

    def passed(self, name: str) -> bool:
        """Say whether every evaluation that is timed passes the module `name`."""
        return self.first is None or self.first.hold(name)

    def call(self, n: int) -> Call:
        """Return a call of `n` samples of noise."""
        return self.run.noise(n, self._generator)

    def _line(self, network: nn.Module, which: str, guided: Callable[..., Tensor] | None = None) -> Line:
        """Measure evaluations of `network`, or of what calls it; where it is in files, of its first blocks."""
        calls: dict[int, Call] = {}

        @torch.no_grad()
        def evaluate(n: int) -> None:
            self._evaluate(network, calls.setdefault(n, self.call(n)), guided)

        first = self.first
        if first is None:
            return line(evaluate, self.sizes[which], self.run.device)
        part = first.part(network)
        return line(
            evaluate, self.sizes[which], self.run.device, passing=0.0 if which == FULL else first.largest(network),
            # while ranges are searched, a block is in memory already
            before=lambda: None if which == OBSERVED else first.used_anew(part),
        )

    def _evaluate(self, network: nn.Module, call: Call, guided: Callable[..., Tensor] | None = None) -> None:
        if self.first is None:
            call.evaluate(guided or network)
        else:
            self.first.run(network, lambda: call.evaluate(guided or network))

    def _whole(self, found: Line, report: Report | None) -> Line:
        """Return what all of the network takes where `found` is what was timed."""
        if self.first is None:
            return found
        return found.scaled(1 / self.first.share(self.run.model.denoiser, report))

    @cached_property
    def saved(self) -> float:
        """The seconds of packing, describing and writing the quantized network; 0 where it lies in memory."""
        if self.first is None:
            return 0.0
        return saving_seconds(self.first, self.placed.network, self.placed.report, self.run.cache.root / PARTS)

    def in_proportion(self, work: Callable[[nn.Module], float]) -> float:
        """Return what `work` returns of the quantized network; of one in files from one block, by weights."""
        network = self.placed.network
        return work(network) if self.first is None else self.first.in_proportion(network, work)

    def _transform(
        self, network: nn.Module, transform: Transform, sites: dict[str, tuple[str, ...]], rules: list[Rule]
    ) -> TransformTime:
        few = self.call(min(self.sizes[OBSERVED], _SHOWN))
        timed = {site: layers for site, layers in sites.items() if all(map(self.passed, layers))}
        if sites and not timed and transform.uses_data:
            raise ConfigError(f"{transform.name} works in none of the first blocks, and no others are timed")
        return transform_time(
            network, transform, sites, rules, lambda shown: self._evaluate(shown, few),
            lambda shown: self._line(shown, OBSERVED), self.run.device, timed or sites,
        )

    def model(self) -> QuantizedModel:
        """Return the network as the quantized model that the run will have."""
        run, plan, bins = self.run, self.plan, self.plan.time_bins if self.plan.n_bins > 1 else None
        return QuantizedModel(run.model, self.placed.network, self.placed.report, run.grid, run.guidance_scale,
                              widths=tuple(plan.widths), time_bins=bins)
