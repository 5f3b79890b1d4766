"""`InParts`: a network that evaluates its batch in parts, side by side on the CPU's threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from ptq_exp.diffusion.call import Call
from ptq_exp.parallel import side_by_side

_watches_all: Callable[[], bool] = getattr(_modules, "_has_any_global_hook", bool)  # undocumented: hooks of all modules
ROWS = 32
"""Samples of a part: with fewer, more of the time goes into calling operations."""


class InParts(nn.Module):
    """A network of independent samples, called as the original: eps = network(x, t, **conditions).

    On a CPU a batch of more than `ROWS` samples is evaluated in equal parts, the same ones however many threads there
    are, each by its share of them. The batch stays whole where gradients are recorded, the network is compiled, hooks
    watch what passes in it, or time or a condition has no row for each sample (a number, None). So it does in networks
    that note something in their attributes (which threads would overwrite) or draw random numbers: the first part of
    the first batch is evaluated alone, to see that.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._pure: bool | None = None  # None = nothing was evaluated yet

    def compile(self, *args, **kwargs) -> None:
        """Compile the network alone."""
        self.network.compile(*args, **kwargs)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return the estimates of all samples, in their order."""
        call = Call(x, t, conditions)
        count = -(-len(x) // ROWS)
        whole = count < 2 or x.device.type != "cpu" or torch.is_grad_enabled()
        if whole or self._pure is False or not (_by_sample(call) and self._divisible()):
            return call.evaluate(self.network)
        tasks: list[Callable[[], Tensor]] = [partial(part.evaluate, self.network) for part in call.parts(count)]
        if self._pure is None:
            before = _state(self.network)
            first = side_by_side([tasks[0], *[lambda: x] * (count - 1)])[0]  # by its share of the threads, as always
            self._pure = _same(before, _state(self.network))
            tasks[0] = lambda: first
        return torch.cat(side_by_side(tasks)) if self._pure else call.evaluate(self.network)

    def _divisible(self) -> bool:
        """Whether nothing but the network itself works on what passes."""
        return self.network._compiled_call_impl is None and not _watches_all() and not any(
            getattr(hook, "reads_values", True)  # those that move weights do not
            for module in self.network.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )


def _by_sample(call: Call) -> bool:
    """Say whether all that is given has a row for each sample: networks may take other things, too."""
    return all(
        isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(call.x)
        for value in (call.t, *call.conditions.values())
    )


def _state(network: nn.Module) -> list[Any]:
    """Return what evaluations of a network may change: attributes of modules, what these hold, and random numbers."""
    found: list[Any] = [bytes(torch.get_rng_state().numpy())]
    for module in network.modules():
        for name, value in vars(module).items():
            rows = enumerate(value) if isinstance(value, list) else ()
            for key, part in ((name, value), *(value.items() if isinstance(value, dict) else rows)):
                found += [key, part, part._version if isinstance(part, Tensor) and not part.is_inference() else None]
    return found


def _same(before: list[Any], after: list[Any]) -> bool:
    return before[0] == after[0] and len(before) == len(after) and all(
        one is other or (isinstance(one, (int, str)) and one == other)
        for one, other in zip(before[1:], after[1:], strict=True)
    )
