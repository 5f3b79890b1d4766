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

    Attributes:
        plain: whether the component last gave a tensor, in place of a tuple or an output of diffusers.
    """

    def __init__(self, component: nn.Module, layout: CallLayout) -> None:
        super().__init__()
        self.component, self.layout, self.plain = component, layout, False

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Estimates [B, C, ...], whatever the network predicts."""
        found = self.component(**self.layout.arguments(x, t, conditions))
        self.plain = isinstance(found, Tensor)
        return channels_first(found if self.plain else found[0])

    def read(self, arguments: dict[str, Any]) -> Call:
        """Return the call that `arguments` make, and take their layout from now on."""
        self.layout = CallLayout.of_call(arguments)
        return self.layout.call(arguments)


def channels_first(estimate: Tensor) -> Tensor:
    """Tokens [B, L, C] -> [B, C, L]; pictures and videos as they are. Its own inverse."""
    return estimate.transpose(1, 2) if estimate.ndim == 3 else estimate


def answering(network: PipelineNetwork, denoiser: nn.Module, *, fixed: bool = False) -> nn.Module:
    """Return the component of `network`, whose estimates are those of `denoiser`.

    Args:
        denoiser: made of `network`, such as with ranges of each step and a correction.
        fixed: every call must have the layout that the network was made for; otherwise it takes whatever it is called
            with: other sizes, other guidance.
    """
    made_for = network.layout
    read = made_for.call if fixed else network.read

    def answer(call: Call) -> Tensor:
        if next(denoiser.buffers(), call.x).device != call.x.device:  # the pipeline moves its component alone
            denoiser.to(call.x.device)
        try:
            return call.evaluate(denoiser)
        finally:
            network.layout = made_for

    component = component_calling(network.component, read, answer)
    wrapped = component.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = wrapped(*args, **kwargs)
        return found[0] if network.plain else found

    component.forward = forward
    return component


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
