"""The component of a pipeline that is quantized."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from ptq_exp.errors import ConfigError

COMPONENTS = ("unet", "transformer", "prior")
FIRST_LAYERS = (
    "*conv_in", "*pos_embed.proj", "*patch_embed.proj", "*x_embedder", "*context_embedder",
    "*caption_projection.linear_1",
)
LAST_LAYERS = ("*conv_out", "*proj_out", "*proj_out_2")
BLOCKS = ("*resnets.*", "*transformer_blocks.*", "*single_transformer_blocks.*", "*attentions.*")


def find_component(pipeline: Any, name: str | None = None) -> str:
    """Return the name of the pipeline's network.

    Args:
        name: of the component; None = `unet` or `transformer`, whichever is there.

    Raises:
        ConfigError: no such component, or none that is a network.
    """
    modules = [key for key, value in pipeline.components.items() if isinstance(value, nn.Module)]
    choices = ", ".join(modules) or "(none)"
    if name is not None and name not in modules:
        raise ConfigError(f"model.component={name}: {type(pipeline).__name__} has the networks {choices}")
    found = name or next((candidate for candidate in COMPONENTS if candidate in modules), None)
    if found is None:
        raise ConfigError(
            f"{type(pipeline).__name__} has none of {', '.join(COMPONENTS)}: name what is to be quantized by "
            f"model.component, one of {choices}"
        )
    if hasattr(getattr(pipeline, found), "_orig_mod"):
        raise ConfigError(f"{found} is compiled (torch.compile): give the pipeline as it was before")
    return found


def own_copy(pipeline: Any) -> Any:
    """Return a pipeline with the networks of `pipeline`, and schedulers and a progress bar of its own."""
    own = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, SchedulerMixin):
            setattr(own, name, copy.deepcopy(component))
    own.set_progress_bar_config(disable=True)
    return own


@contextmanager
def standing_in(pipeline: Any, name: str, component: nn.Module) -> Iterator[None]:
    """While in force, `pipeline` has `component` in the place of its component `name`."""
    before = getattr(pipeline, name)
    setattr(pipeline, name, component)
    try:
        yield
    finally:
        setattr(pipeline, name, before)


def top_layers(component: nn.Module, globs: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `globs` that can match a layer outside of blocks: `*proj_out` is an attention's, too, in U-Nets.

    Names are those inside a `PipelineNetwork`.
    """
    own = {name for name, _ in component.named_modules()}
    return tuple(f"component.{glob.lstrip('*')}" for glob in globs if glob.lstrip("*") in own)
