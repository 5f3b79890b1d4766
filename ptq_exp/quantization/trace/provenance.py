"""Where a tensor comes from: notes on tensors that follow them through the functions of one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ptq_exp.quantization.trace.evaluate import evaluating

# The same values in the same place.
KEEPS = {F.dropout, torch.clone, torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float}
# Same values, perhaps in another place or shape (dropout: evaluation mode).
MOVES = {
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten,
    torch.Tensor.unflatten, torch.Tensor.permute, torch.permute, torch.Tensor.transpose, torch.transpose,
    torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, torch.Tensor.unsqueeze, torch.unsqueeze,
    torch.Tensor.squeeze, torch.squeeze, torch.Tensor.expand, torch.Tensor.__getitem__, torch.Tensor.detach,
    torch.Tensor.chunk, torch.chunk, torch.Tensor.split, torch.split, torch.Tensor.to, torch.Tensor.float,
    torch.Tensor.repeat_interleave, torch.repeat_interleave, F.dropout, F.pad, F.max_pool2d,
}


class Notes(TorchFunctionMode):
    """Keeps a note on tensors; `carry` says what becomes of it in each function that is called.

    Args:
        carry: (function, positional arguments, keyword arguments, output tensor, note of an argument) -> note of the
            output, or None for none. Called with the note of the first argument (None: it has none).
    """

    def __init__(self, carry: Callable[[Callable, tuple, dict, Tensor, Notes], Any]) -> None:
        super().__init__()
        self.carry = carry
        # by identity, and weak: what the network drops is free
        self._noted = WeakIdKeyDictionary()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = function(*args, **kwargs)
        for output in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(output, Tensor):
                # set before the old note can be seen: a function may return its own argument
                self.set(output, self.carry(function, args, kwargs, output, self))
        return returned

    def of(self, tensor: Any) -> Any:
        """Return the note on `tensor`, None if there is none."""
        return self._noted.get(tensor) if isinstance(tensor, Tensor) else None

    def set(self, tensor: Tensor, note: Any) -> None:
        """Note `note` on `tensor`; None takes its note away."""
        if note is None:
            self._noted.pop(tensor, None)
        else:
            self._noted[tensor] = note


@contextmanager
def watching(model: nn.Module) -> Iterator[Callable]:
    """Hooks that live as long as the context; ``watch(module, before, after)`` adds one of each (or None).

    `before` is called with the input, `after` with the output of the module.
    """
    with ExitStack() as hooks, evaluating(model), torch.no_grad():

        def watch(module: nn.Module, before=None, after=None) -> None:
            if before is not None:
                hooks.enter_context(module.register_forward_pre_hook(
                    lambda _, args, kwargs: before(args[0] if args else kwargs["input"]), with_kwargs=True
                ))
            if after is not None:
                hooks.enter_context(module.register_forward_hook(lambda _, args, output: after(output)))

        yield watch
