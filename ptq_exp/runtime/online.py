"""What transforms compute at run time, around layers in plain operations: in floating point, before and beside them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ptq_exp.quantization.online import OnlineLayer


def with_online(layer: nn.Module, made: nn.Module) -> nn.Module:
    """Give `made`, which stands for `layer` and has a module `output` at its end, the online parts of `layer`."""
    if not isinstance(layer, OnlineLayer):
        return made
    made.online, made.branch, made.after, made.output = layer.online, layer.branch, made.output, nn.Identity()
    made.register_forward_pre_hook(_before)
    made.register_forward_hook(_after)
    return made


def _before(made: Any, args: tuple[Tensor, ...]) -> Tensor:
    return made.online(args[0])


def _after(made: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """`args` are what `_before` returned."""
    return made.after(y if made.branch is None else y + made.branch(args[0]))
