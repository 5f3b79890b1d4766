"""How a network is called on its example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def evaluate(network: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Return what `network` makes of `inputs`: positional arguments, and keyword arguments in a mapping at their end.

    So `torch.onnx.export` takes them, too.
    """
    if inputs and isinstance(inputs[-1], Mapping):
        return network(*inputs[:-1], **inputs[-1])
    return network(*inputs)
