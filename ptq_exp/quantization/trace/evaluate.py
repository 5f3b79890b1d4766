"""How a network is called on its example inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Ended(Exception):
    """A hook has what it was there for: the rest of the forward is not wanted."""


def evaluate(network: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Return what `network` makes of `inputs`: positional arguments, and keyword arguments in a mapping at their end.

    So `torch.onnx.export` takes them, too.
    """
    if inputs and isinstance(inputs[-1], Mapping):
        return network(*inputs[:-1], **inputs[-1])
    return network(*inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, then restore each one's own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and outputs of models."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
