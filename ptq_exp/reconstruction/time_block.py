"""The layers that depend on the time alone, as a block of their own that is reconstructed on every time there is.

A sampler asks a network for finitely many times, so what these layers read is known exactly. Huang et al. 2024
("TFMQ-DM", section 4.2) take them out of the residual blocks that they stand in and reconstruct them together: the
embedding's own layers and all projections of it, by the sum of the errors of all projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import on_device
from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import of_samples
from ptq_exp.quantization.calibrate import has_quantized_weight
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.reconstruction.blocks import Block
from ptq_exp.reconstruction.capture import Calls
from ptq_exp.reconstruction.copies import Batch
from ptq_exp.reconstruction.subnetwork import Part, Plan, check_same, plan_part


@dataclass(frozen=True, eq=False)
class TimeBlock(Block):
    """Layers that depend on the time alone; `layers` are named within the `Part`.

    Attributes:
        plan: how they hang together.
        batches: calls that hold every time once, with any states and conditions.
        step_rows: row of the activation ranges of each time, int64 [N]; None = the one in force.
    """

    plan: Plan | None = None
    batches: tuple[Batch, ...] = ()
    step_rows: Tensor | None = None

    def module(self, network: nn.Module) -> Part:
        """Return these layers of `network` as one module."""
        return Part(network, self.plan)

    @property
    def inner(self) -> tuple[str, ...]:
        """Those of `layers` that others follow from."""
        names = [step.layer for step in self.plan.steps if step.layer is not None]
        leaves = {f"layers.{names.index(leaf)}" for leaf in self.plan.leaves}
        return tuple(layer for layer in self.layers if layer not in leaves)

    @torch.no_grad()
    def capture(self, network: nn.Module, device: torch.device, *, output: bool) -> Calls:
        """Return what the roots read (and the leaves make: `output`) in `network` at all times.

        Raises:
            QuantizationError: the layers by themselves do not give what they give in the network, or one is called on
                different values.
        """
        inputs: dict[str, list[Tensor]] = {step.layer: [] for step in self.plan.steps if step.layer is not None}
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.plan.leaves}
        start = evaluation = 0

        def read(name: str, x: Tensor) -> None:
            if len(inputs[name]) < evaluation:
                inputs[name].append(x.clone())
            else:  # called again
                check_same(name, inputs[name][-1], x)

        def made(name: str, y: Tensor) -> None:
            if len(outputs[name]) < evaluation:
                outputs[name].append(y.flatten(1))

        with watching(network) as watch:
            for name in inputs:
                watch(network.get_submodule(name), before=partial(read, name))
            for name in outputs:
                watch(network.get_submodule(name), after=partial(made, name))
            for evaluation, batch in enumerate(self.batches, start=1):  # noqa: B007
                rows = None if self.step_rows is None else self.step_rows[start : start + len(batch[0])]
                with of_samples(network, rows):
                    evaluate(network.forward, on_device(batch, device))
                start += len(batch[0])
        values = tuple(torch.cat(inputs[name]) for name in self.plan.roots)
        if not output:
            return Calls.of(values, {}, step_rows=self.step_rows)
        written = torch.cat([torch.cat(seen) for seen in outputs.values()], 1)
        self._check(network, values, written)
        return Calls.of(values, {}, written, step_rows=self.step_rows)

    def _check(self, network: nn.Module, read: tuple[Tensor, ...], made: Tensor) -> None:
        """Refuse a function between the layers that is bound to the batch that the plan was made with."""
        try:
            alone = self.module(network)(*read)
            near = torch.finfo(made.dtype).eps ** 0.5  # in other batches sums are rounded differently
            same = alone.shape == made.shape and bool((alone - made).abs().max() <= near * made.abs().max())
        except RuntimeError:
            same = False
        if not same:
            raise QuantizationError(
                f"{self.name}: {next(iter(self.plan.roots))} and what follows cannot be taken out of this network: set "
                "quantization.time_layers=calibration_set"
            )


def find_time_blocks(
    network: nn.Module, reference: nn.Module, layers: Sequence[str], batches: Sequence[Batch],
    step_rows: Tensor | None = None, *, joint: bool = True,
) -> list[TimeBlock]:
    """Return the `layers` of the time alone as one block (`joint`), or each as one; [] if none is quantized.

    Args:
        network: quantized; layers without quantized weights take part, but have nothing to learn.
        reference: the full-precision network it was made from.
        batches, step_rows: see `TimeBlock`.

    Raises:
        QuantizationError: a layer is called on different values in one forward.
    """
    found = []
    device = next(reference.parameters()).device
    inputs = on_device(batches[0], device)
    for number, names in enumerate([tuple(layers)] if joint else [(name,) for name in layers]):
        plan = plan_part(reference, names, inputs)
        quantized = tuple(
            f"layers.{n}"
            for n, step in enumerate(step for step in plan.steps if step.layer is not None)
            if has_quantized_weight(network.get_submodule(step.layer))
        )
        if quantized:
            name = "layers of the time" if joint else layers[number]
            found.append(TimeBlock(name, quantized, plan=plan, batches=tuple(batches), step_rows=step_rows))
    return found
