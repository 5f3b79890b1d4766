"""All blocks of a network one after the other: capture, optimise, measure on held-out samples, keep what is better."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.errors import DataError
from ptq_exp.reconstruction.answers import BlockAnswers
from ptq_exp.reconstruction.block_report import BlockError, BlockReport
from ptq_exp.reconstruction.blocks import Block
from ptq_exp.reconstruction.capture import Arena, capture
from ptq_exp.reconstruction.copies import Batch
from ptq_exp.reconstruction.gptq_block import GPTQBlock, GPTQSettings
from ptq_exp.reconstruction.optimise import BlockData, BlockOptimisation, Settings, block_error
from ptq_exp.reconstruction.time_block import TimeBlock

HELD_OUT = 8
"""Every eighth calibration sample is kept from the optimisation, to judge it by."""


def split(calibration_set: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Return (samples to optimise on, held-out samples): every `HELD_OUT`-th is held out, the last one of fewer.

    Raises:
        DataError: fewer than two samples.
    """
    n = len(calibration_set)
    if n < 2:
        raise DataError("reconstruction judges blocks by held-out samples: set calibration.n_samples to 2 or more")
    held_out = np.arange(n) % HELD_OUT == min(n, HELD_OUT) - 1
    return calibration_set.take(~held_out), calibration_set.take(held_out)


def _held(module: nn.Module, parameters: Collection[int]) -> bool:
    return any(id(parameter) in parameters for parameter in module.parameters())


class Reconstruction:
    """The reconstruction of one block after the other; each depends on the network as its predecessors left it.

    for block in reconstruction.remaining:
        reconstruction.begin()
        for _ in range(reconstruction.iterations):
            reconstruction.step()
        reconstruction.end()

    The state between two blocks is the quantized network's state dict and `reports`; all draws of a block depend on
    (seed, block), so that a reconstruction continued from there is the same one.

    Args:
        network: quantized and calibrated, weights frozen; changed in place, block by block.
        reference: the full-precision network it was made from.
        blocks: in execution order, see `find_blocks` and `find_time_blocks`.
        calibration_set: at least two samples.
        settings: of every block: `Settings` (learned roundings) or `GPTQSettings`.
        seed: of all draws.
        batch_size: samples per forward while inputs are captured.
        cache_bytes: memory for captured rows of one block; the rest goes to files.
        folder: for these files; it must belong to this computation alone.
        row_of_step: for each sampling step the row of the activation ranges that it uses, int64 [S]; None = the row of
            `network` that is in force serves all.

    Attributes:
        batches: (one of both networks, samples) -> their batches; whoever replaces it may change what the network
            does with a batch before it reaches the block whose turn it is.
    """

    def __init__(
        self, network: nn.Module, reference: nn.Module, blocks: Sequence[Block], calibration_set: CalibrationSet,
        settings: Settings | GPTQSettings, *, seed: int, batch_size: int, cache_bytes: float, folder: Path,
        row_of_step: Tensor | None = None,
    ) -> None:
        self.network, self.reference, self.blocks = network, reference, list(blocks)
        self.optimised_on, self.held_out = split(calibration_set)
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.arena = Arena(cache_bytes, folder)
        self.row_of_step = row_of_step
        self.batches: Callable[[nn.Module, CalibrationSet], Iterable[Batch]] = self._in_memory
        self._answers: dict[tuple[bool, bool], BlockAnswers] = {}
        self.reports: list[BlockReport] = []
        self.current: BlockOptimisation | GPTQBlock | None = None

    @property
    def block(self) -> Block | None:
        """The block whose turn it is; None after the last one."""
        return self.blocks[len(self.reports)] if len(self.reports) < len(self.blocks) else None

    @property
    def remaining(self) -> list[Block]:
        """The blocks that have no report yet."""
        return self.blocks[len(self.reports) :]

    @property
    def iterations(self) -> int:
        """Steps of the block whose turn it is."""
        return 0 if self.block is None else self.settings.iterations(self.block)

    def begin(self) -> None:
        """Capture what the block needs."""
        self._started = time.perf_counter()
        self.arena.clear()
        if isinstance(self.block, TimeBlock):
            data = self._judged_by = self._capture_times(self.block)
        else:
            data = self._capture(self.optimised_on, reference=self.settings.reads_reference)
            self._judged_by = self._capture(self.held_out)
        self._before = self._errors()
        self.current = self.settings.start(self.block, self.network, self.reference, data, self.seed)

    def step(self) -> Tensor:
        """One iteration; returns the loss of its batch, 0-d."""
        return self.current.step()

    def end(self) -> BlockReport:
        """Put the optimised solution in force, or the old one where that is better, and report."""
        done = self.current
        done.apply()
        after = self._errors()
        # not worse, rather than better: NaN is never kept
        kept = after[1].mse <= self._before[1].mse
        if not kept:
            done.revert()
        report = BlockReport(
            index=len(self.reports), name=self.block.name, layers=len(self.block.layers),
            weights=done.weights, changed=done.changed(), kept=kept,
            before_fp=self._before[0], after_fp=after[0], before_quantized=self._before[1], after_quantized=after[1],
            loss=done.loss, iterations=done.t, seconds=round(time.perf_counter() - self._started, 2),
            details=tuple(done.details),
        )
        self.reports.append(report)
        self.current = self._judged_by = None
        self.arena.clear()
        return report

    def _errors(self) -> tuple[BlockError, BlockError]:
        """Of the block as it is now, on held-out full-precision inputs and on those of the quantized network."""
        module, data = self.block.module(self.network), self._judged_by
        inputs = (data.full, data.quantized)
        return tuple(block_error(module, calls, data.full.output, self.block.name) for calls in inputs)

    def rows_of(self, samples: CalibrationSet) -> Tensor | None:
        """Return the row of the activation ranges of each row of the batches of `samples`; None = that in force."""
        # with guidance, of both halves
        return None if self.row_of_step is None else self.row_of_step[samples.batch_steps(self.batch_size)]

    def _in_memory(self, network: nn.Module, samples: CalibrationSet) -> Iterable[Batch]:
        """Yield the batches that `network` is run on until it reaches the block whose turn it is."""
        key = (network is self.reference, samples is self.held_out)
        answers = self._answers.setdefault(key, BlockAnswers(network, self.arena))
        return answers.before(samples.batches(self.batch_size), self._finished())

    def _finished(self) -> list[str]:
        """Return the modules that had their turn and share no parameter with one that has not."""
        learned = {id(p) for block in self.remaining for p in block.module(self.network).parameters()}
        done = [block for block in self.blocks[: len(self.reports)] if not isinstance(block, TimeBlock)]
        return [block.name for block in done if not _held(block.module(self.network), learned)]

    def _capture(self, samples: CalibrationSet, *, reference: bool = True) -> BlockData:
        device = next(self.network.parameters()).device
        rows = len(samples.batch_steps(self.batch_size))
        step_rows = self.rows_of(samples)

        def calls(network: nn.Module, output: bool):
            return capture(
                network, self.block.name, self.batches(network, samples), rows, self.arena, output=output,
                device=device, step_rows=step_rows,
            )

        return BlockData(calls(self.reference, True) if reference else None, calls(self.network, False), self.arena)

    def _capture_times(self, block: TimeBlock) -> BlockData:
        """All times that there are: no other ones will ever come, that a block could be judged by."""
        device = next(self.network.parameters()).device
        full = block.capture(self.reference, device, output=True)
        return BlockData(full, block.capture(self.network, device, output=False), self.arena)
