"""The outputs of a block's inner layers, and what they are in the full-precision block: targets of further losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ptq_exp.reconstruction.capture import Arena, Calls


@contextmanager
def outputs_of(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, collect {layer: output} of the layers `names` of `module` in the dictionary that is given."""
    found: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple, output: Tensor, name: str) -> None:
        found[name] = output

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(module.get_submodule(name).register_forward_hook(partial(keep, name=name)))
        yield found


class InnerTargets:
    """The outputs of inner layers of a full-precision block on the full-precision inputs, row by row.

    Where there is room each row is computed once, in batches of the size that asks for them; otherwise whenever it is
    asked for. A GPU computes them faster than it copies them, so that there nothing is kept.

    Args:
        module: the full-precision block.
        names: of the layers in it.
        calls: of the block in the full-precision network.
        batch_size: rows that are asked for at once; fewer calls than this are asked for all together.
        times: how often they will be asked for.
        arena: room for them; None = there is none.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], calls: Calls, batch_size: int, times: int, arena: Arena | None
    ) -> None:
        self.module, self.names, self.calls = module, names, calls
        self.kept: dict[str, Tensor] | None = None
        batch_size = min(batch_size, len(calls))
        worth = bool(names) and batch_size > 1 and times * batch_size > len(calls)
        if worth and arena is not None and calls.tensors[0].device.type == _device(module).type == "cpu":
            self._compute(batch_size, arena)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return {layer: output} of the rows `index`, on the device of the block."""
        if not self.names:
            return {}
        if self.kept is not None:
            return {name: whole[index] for name, whole in self.kept.items()}
        return self._computed(index)

    @torch.no_grad()
    def _computed(self, index: Tensor | slice) -> dict[str, Tensor]:
        args, kwargs = self.calls.arguments(self.calls.rows(index, _device(self.module)))
        with outputs_of(self.module, self.names) as outputs:
            self.module(*args, **kwargs)
        return outputs

    def _compute(self, batch_size: int, arena: Arena) -> None:
        """Compute all rows, if each output has one for each and there is room in memory."""
        n = len(self.calls)
        if any(len(output) != 1 for output in self._computed(slice(0, 1)).values()):
            return
        first = self._computed(slice(0, batch_size))
        if any(len(output) != batch_size for output in first.values()) or not arena.has_room(n, first.values()):
            return
        kept = {name: arena.allocate(n, output) for name, output in first.items()}
        for end in range(batch_size, n + batch_size, batch_size):
            # all of one size, as sums over other batches may be rounded differently
            rows = slice(min(end, n) - batch_size, min(end, n))
            for name, output in self._computed(rows).items():
                kept[name][rows] = output
        self.kept = kept


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
