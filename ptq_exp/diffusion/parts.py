"""`InParts`: a network that evaluates its batch in parts, side by side on the CPU's threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call
from ptq_exp.parallel import side_by_side

ROWS = 32
"""Samples of a part: with fewer, more of the time goes into calling operations."""


class InParts(nn.Module):
    """A network of independent samples, called as the original: eps = network(x, t, **conditions).

    On a CPU a batch of more than `ROWS` samples is evaluated in equal parts, the same ones however many threads there
    are, each by its share of them. Where gradients are recorded, the network is compiled, or hooks watch what passes in
    it, the batch stays whole.
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
        if count < 2 or x.device.type != "cpu" or torch.is_grad_enabled() or not self._divisible():
            return call.evaluate(self.network)
        return torch.cat(side_by_side([partial(part.evaluate, self.network) for part in call.parts(count)]))

    def _divisible(self) -> bool:
        """Whether nothing but the network itself works on what passes."""
        return self.network._compiled_call_impl is None and not any(
            module._forward_hooks or module._forward_pre_hooks for module in self.network.modules()
        )
