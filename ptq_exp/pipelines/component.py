"""The component of a pipeline that is quantized."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ptq_exp.errors import ConfigError

COMPONENTS = ("unet", "transformer", "prior")
FIRST_LAYERS = (
    "*conv_in", "*pos_embed.proj", "*patch_embed.proj", "*x_embedder", "*context_embedder",
    "*caption_projection.linear_1",
)
LAST_LAYERS = ("*conv_out", "*proj_out", "*proj_out_2")
BLOCKS = ("*resnets.*", "*transformer_blocks.*", "*single_transformer_blocks.*", "*attentions.*")
_CHUNK = 1 << 26  # bytes of a tensor that are hashed at a time


def find_component(pipeline: Any, name: str | None = None) -> str:
    """Return the name of the pipeline's network.

    Args:
        name: of the component; None = `unet` or `transformer`, whichever is there.

    Raises:
        ConfigError: no such component, or none that is a network.
    """
    modules = [key for key, value in pipeline.components.items() if isinstance(value, nn.Module)]
    if name is not None:
        if name not in modules:
            raise ConfigError(
                f"model.component={name}: {type(pipeline).__name__} has the networks {', '.join(modules) or '(none)'}"
            )
        return name
    for candidate in COMPONENTS:
        if candidate in modules:
            return candidate
    raise ConfigError(
        f"{type(pipeline).__name__} has none of {', '.join(COMPONENTS)}: name what is to be quantized by "
        f"model.component, one of {', '.join(modules) or '(none)'}"
    )


def top_layers(component: nn.Module, globs: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `globs` that can match a layer outside of blocks: `*proj_out` is an attention's, too, in U-Nets.

    Names are those inside a `PipelineNetwork`.
    """
    own = {name for name, _ in component.named_children()}
    exact = tuple(f"component.{glob.lstrip('*')}" for glob in globs if glob.lstrip("*").split(".")[0] in own)
    return exact


def add_weights(digest: Any, network: nn.Module) -> None:
    """Add all weights and buffers of a network to a hash."""
    for key, value in network.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        data = value.detach().cpu().contiguous().view(-1)
        if data.numel():
            raw = data.view(torch.uint8) if data.dtype != torch.bool else data.to(torch.uint8)
            for part in raw.split(_CHUNK):
                digest.update(part.numpy())


def pipeline_digest(pipeline: Any) -> str:
    """Return a SHA-256 of all weights and settings that decide a pipeline's images."""
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digest.update(name.encode())
            add_weights(digest, component)
        elif hasattr(component, "config"):
            settings = {key: value for key, value in component.config.items() if not key.startswith("_")}
            digest.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()
