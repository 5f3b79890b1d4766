"""What is timed of a network whose weights lie in files: its first blocks, and all others in proportion."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.experiment.forecast.probe import BUDGET
from ptq_exp.quantization import Report
from ptq_exp.quantization.offload import evict, outermost, weight_bytes, without
from ptq_exp.quantization.trace.evaluate import Ended


class FirstBlocks:
    """The blocks of a network that one evaluation reaches in about a second; measurements end behind the last of them.

    Args:
        evaluate: evaluates the network on one sample.
        patterns: globs of its blocks.
        from_disk: memory is too small for the network, so that in a run weights are gone when they are used again.

    Attributes:
        names: of these blocks, in the order of their calls.

    Raises:
        ConfigError: no block matches.
    """

    def __init__(
        self, network: nn.Module, patterns: Sequence[str], evaluate: Callable[[], object], *, from_disk: bool = False
    ) -> None:
        self.from_disk, self.every, self.names = from_disk, outermost(network, patterns), list[str]()
        started = time.perf_counter()

        def leave(name: str, *_: object) -> None:
            self.names.append(name)
            if time.perf_counter() - started > BUDGET:
                raise Ended

        with ExitStack() as hooks, suppress(Ended), torch.no_grad():
            for name in self.every:
                hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(leave, name)))
            evaluate()
        if not self.names:
            raise ConfigError(f"no module of the network is named {' or '.join(patterns)}")

    def share(self, network: nn.Module, report: Report | None) -> float:
        """Return the part of all work that these blocks do: of multiply-accumulates, or of weights without a report."""
        if report is None:
            sizes = {name: float(p.numel()) for name, p in network.named_parameters()}
        else:
            sizes = {row.name: float(row.macs) for row in report.rows}
        inside = sum(size for name, size in sizes.items() if within(name, self.names))
        return inside / sum(sizes.values()) if inside else 1.0

    def hold(self, name: str) -> bool:
        """Say whether a module lies in one of these blocks: evaluations pass it."""
        return within(name, self.names)

    def behind(self, name: str) -> bool:
        """Say whether a module lies in another block: no evaluation reaches it."""
        return within(name, self.every) and not self.hold(name)

    def part(self, network: nn.Module) -> nn.Module:
        """Return `network` without the blocks behind; modules are shared."""
        return without(network, {*self.every} - {*self.names})

    def run(self, network: nn.Module, evaluate: Callable[[], object]) -> None:
        """Call `evaluate`, which evaluates `network`, and end it behind the last of these blocks."""
        with ExitStack() as stack, suppress(Ended):
            stack.enter_context(network.get_submodule(self.names[-1]).register_forward_hook(_end))
            evaluate()

    def used_anew(self, module: nn.Module) -> None:
        """Leave the weights of `module` where a run finds them, before they are timed."""
        if self.from_disk:
            evict(module)

    def largest(self, network: nn.Module) -> float:
        """Return the bytes of the largest of these blocks: of a copy in files one is in memory at a time."""
        return float(max(weight_bytes(network.get_submodule(name)) for name in self.names))

    def in_proportion(self, network: nn.Module, work: Callable[[nn.Module], float]) -> float:
        """Return what `work` returns of the last of these blocks, times the weights of `network` over its own."""
        block = network.get_submodule(self.names[-1])
        return work(block) * weight_bytes(network) / weight_bytes(block)


def within(name: str, blocks: Collection[str]) -> bool:
    """Say whether a module is one of `blocks`, or lies in one of them."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _end(*_: object) -> None:
    raise Ended
