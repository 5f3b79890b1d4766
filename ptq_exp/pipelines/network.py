"""`PipelineNetwork`: a component of a pipeline as a network of state, time and conditions; and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call
from ptq_exp.pipelines.layout import CallLayout
from ptq_exp.pipelines.nested import bound_arguments


class PipelineNetwork(nn.Module):
    """The `component` called as (x [B, ...], t [B], **conditions) -> estimates [B, C, ...].

    Rows are what the pipeline evaluates: with guidance there are two or more of each image. Estimates of tokens
    [B, L, C] are given with their channels first, [B, C, L], as corrections and statistics count channels.

    Args:
        component: U-Net or transformer; called by keyword arguments.
        layout: of its calls.
    """

    def __init__(self, component: nn.Module, layout: CallLayout) -> None:
        super().__init__()
        self.component, self.layout = component, layout

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Estimates [B, C, ...], whatever the network predicts."""
        arguments = self.layout.arguments(x, t, conditions) | {"return_dict": False}
        return channels_first(self.component(**arguments)[0])


def channels_first(estimate: Tensor) -> Tensor:
    """Tokens [B, L, C] -> [B, C, L]; pictures and videos as they are. Its own inverse."""
    return estimate.transpose(1, 2) if estimate.ndim == 3 else estimate


def component_calling(
    component: nn.Module, arguments_to_call: Callable[[dict[str, Any]], Call], answer: Callable[[Call], Tensor]
) -> nn.Module:
    """Return a module that a pipeline takes for `component`, and whose estimates are those of `answer`.

    It shares parameters, settings and attributes with `component`; `component` itself stays as it is.

    Args:
        arguments_to_call: from the arguments by name, see `CallLayout.call`.
        answer: estimates [B, C, ...] of a call.
    """
    shell, original = copy.copy(component), type(component).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = bound_arguments(original.__get__(component), args, kwargs)
        return_dict = arguments.get("return_dict", True)
        estimate = channels_first(answer(arguments_to_call(arguments)))
        return Transformer2DModelOutput(sample=estimate) if return_dict else (estimate,)

    shell.forward = forward
    return shell
