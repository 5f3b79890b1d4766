"""`InParts`: a network that evaluates its batch in parts, side by side on the CPU's threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ptq_exp.diffusion.call import Call
from ptq_exp.parallel import side_by_side

ROWS = 32
"""Samples of a part: with fewer, more of the time goes into calling operations."""


class InParts(nn.Module):
    """A network of independent samples, called as the original: eps = network(x, t, **conditions).

    On a CPU a batch of more than `ROWS` samples is evaluated in equal parts, the same ones however many threads there
    are, each by its share of them. The batch stays whole where gradients are recorded, the network is compiled, hooks
    watch what passes in it, or time or a condition has no row for each sample (a number, None).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def compile(self, *args, **kwargs) -> None:
        """Compile the network alone."""
        self.network.compile(*args, **kwargs)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return the estimates of all samples, in their order."""
        call = Call(x, t, conditions)
        count = -(-len(x) // ROWS)
        whole = count < 2 or x.device.type != "cpu" or torch.is_grad_enabled()
        if whole or not (_by_sample(call) and self._divisible()):
            return call.evaluate(self.network)
        return torch.cat(side_by_side([partial(part.evaluate, self.network) for part in call.parts(count)]))

    def _divisible(self) -> bool:
        """Whether nothing but the network itself works on what passes."""
        return self.network._compiled_call_impl is None and not _has_any_global_hook() and not any(
            module._forward_hooks or module._forward_pre_hooks for module in self.network.modules()
        )


def _by_sample(call: Call) -> bool:
    """Say whether all that is given has a row for each sample: networks may take other things, too."""
    return all(
        isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(call.x)
        for value in (call.t, *call.conditions.values())
    )
