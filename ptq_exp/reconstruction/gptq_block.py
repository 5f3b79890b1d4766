"""GPTQ of the layers of one block, in the order of their calls: each sees inputs that the layers before it left.

What enters the block is captured once. A layer's Hessian is summed over all these rows, which are of all sampling
steps and of both halves of guidance, in the quantized network with all layers before it rounded, behind the layer's
own input quantizer. Layers that read the very same tensor (q, k and v) are summed in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.quantization.trace.evaluate import Ended
from ptq_exp.reconstruction.block_report import LayerRounding
from ptq_exp.reconstruction.blocks import Block
from ptq_exp.reconstruction.gptq_grid import grid_of, put_
from ptq_exp.reconstruction.gptq_rounding import round_columns
from ptq_exp.reconstruction.hessian import InputHessian, grouped, hessian_bytes
from ptq_exp.reconstruction.optimise import EVALUATION_BATCH, BlockData


@dataclass(frozen=True)
class GPTQSettings:
    """How every layer is rounded.

    Attributes:
        act_order: columns by falling diagonal of the Hessian, rather than from left to right.
        damping: share of the mean of the diagonal that is added to it.
        hessian_bytes: layers whose Hessian is larger keep their nearest rounding.
    """

    act_order: bool = True
    damping: float = 0.01
    hessian_bytes: float = 2e9

    reads_reference = False
    """Whether the optimisation needs outputs of the full-precision network."""

    def iterations(self, block: Block) -> int:
        """Return the number of steps of one block: its layers."""
        return len(block.layers)

    def start(self, block: Block, network: nn.Module, reference: nn.Module, data: BlockData, seed: int) -> GPTQBlock:
        """Return the rounding of one block; nothing in it is drawn, so that `seed` is not used."""
        return GPTQBlock(block, network, reference, data, self)


class GPTQBlock:
    """The rounding of one block's layers; as `BlockOptimisation`, one layer per `step`.

    Args:
        block: of both networks.
        network: quantized, calibrated, its weights frozen; predecessors of the block rounded. Changed in place.
        reference: the full-precision network, whose weights are rounded.
        data: rows that enter the block in `network`.
        settings: of every layer.
    """

    def __init__(
        self, block: Block, network: nn.Module, reference: nn.Module, data: BlockData, settings: GPTQSettings
    ) -> None:
        self.block, self.settings, self.calls = block, settings, data.quantized
        self.module, self.layers = block.module(network), block.modules(network)
        self.full = [layer.weight for layer in block.modules(reference)]
        self.device = self.layers[0].weight.device
        self.before = [layer.weight.clone() for layer in self.layers]
        self.weights = sum(layer.weight.numel() for layer in self.layers)
        self.details: list[LayerRounding] = []
        self._hessians: dict[int, InputHessian] = {}

    @property
    def t(self) -> int:
        """Layers so far."""
        return len(self.details)

    @property
    def loss(self) -> float:
        """Sum of the squared errors of the layers' outputs, per input."""
        return math.fsum(detail.after or 0.0 for detail in self.details)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Round the next layer; returns its squared error over that of its nearest rounding, 0-d."""
        number = self.t
        if hessian_bytes(self.layers[number]) > self.settings.hessian_bytes:
            size = hessian_bytes(self.layers[number]) / 1e9
            note = f"its Hessian of {size:.2f} GB is larger than reconstruction.hessian_gb"
            self.details.append(LayerRounding(self.block.layers[number], note=note))
            return torch.tensor(1.0)
        if number not in self._hessians:
            wanted = self._reading_the_same(number)
            if not wanted:
                self.details.append(LayerRounding(self.block.layers[number], note="the block reads its weight alone"))
                return torch.tensor(1.0)
            self._hessians = self._summed(wanted)
        detail = self._round(number, self._hessians.pop(number))
        self.details.append(detail)
        return torch.tensor(detail.after / detail.before if detail.before else 1.0)

    def apply(self) -> None:
        """Do nothing: each layer's weight was put in force by its step, as later ones depend on it."""

    @torch.no_grad()
    def revert(self) -> None:
        """Give the network the weights it had before."""
        for layer, old in zip(self.layers, self.before, strict=True):
            layer.weight.copy_(old)

    def changed(self) -> float:
        """Share of the weights that now differ from what they were before."""
        differ = sum(int((layer.weight != old).sum()) for layer, old in zip(self.layers, self.before, strict=True))
        return differ / self.weights

    def _round(self, number: int, hessian: InputHessian) -> LayerRounding:
        """Round one layer, unless its nearest rounding is as good."""
        layer, weight = self.layers[number], self.full[number].to(self.device)
        grid = grid_of(layer, weight)
        found = round_columns(
            grouped(layer, weight), hessian.total, grid, act_order=self.settings.act_order,
            damping=self.settings.damping,
        )
        per_input = 1 / max(1, hessian.rows)
        before, after = found.before * per_input, found.after * per_input
        better = found.after < found.before
        if better:
            put_(layer, grid, found.levels)
        return LayerRounding(
            self.block.layers[number], before, after if better else before, found.damping, hessian.rows,
            "" if better else "its nearest rounding is as good",
        )

    def _reading_the_same(self, number: int) -> dict[int, int]:
        """{layer: calls in one forward} of the layer `number` and of later ones that read the very tensor it reads.

        As far as their Hessians fit together.
        """
        read: dict[int, list[Tensor]] = {}

        def enter(n: int, x: Tensor) -> None:
            read.setdefault(n, []).append(x)  # kept: the identity of one that is gone may be given to another

        with self._watched(range(number, len(self.layers)), enter, quantized=False):
            self._run(slice(0, 1))
        chosen, room = {}, self.settings.hessian_bytes
        for n, tensors in sorted(read.items()) if number in read else ():
            if [*map(id, tensors)] == [*map(id, read[number])]:
                room -= hessian_bytes(self.layers[n])
                if room < 0:
                    break
                chosen[n] = len(tensors)
        return chosen

    def _summed(self, wanted: dict[int, int]) -> dict[int, InputHessian]:
        """Return the Hessians of some layers, over all rows; `wanted` as `_reading_the_same` gives it."""
        found = {n: InputHessian(self.layers[n]) for n in wanted}
        read: list[tuple[int, Tensor]] = []

        def enter(n: int, x: Tensor) -> None:
            read.append((n, x))
            if len(read) == sum(wanted.values()):
                raise Ended

        with self._watched(wanted, enter, quantized=True):
            for start in range(0, len(self.calls), EVALUATION_BATCH):
                with suppress(Ended):
                    self._run(slice(start, start + EVALUATION_BATCH))
                # behind the forward: inside, a module that quantizes its products would take these for its own
                for n, x in read:
                    found[n].add(x)
                read.clear()
        return found

    def _run(self, rows: slice) -> None:
        args, kwargs = self.calls.arguments(self.calls.rows(rows, self.device))
        with self.calls.ranges_of(self.module, rows):
            self.module(*args, **kwargs)

    @contextmanager
    def _watched(self, numbers, enter: Callable[[int, Tensor], None], *, quantized: bool) -> Iterator[None]:
        """Call ``enter(number, x)`` with what each layer reads, before or behind its input quantizer."""
        with ExitStack() as hooks:
            for n in numbers:
                quantizer = self.layers[n].input_quantizer
                hooks.enter_context(
                    quantizer.register_forward_hook(lambda _, args, y, n=n: enter(n, y)) if quantized else
                    quantizer.register_forward_pre_hook(lambda _, args, n=n: enter(n, args[0]))
                )
            yield
