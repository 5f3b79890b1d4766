"""U-Nets of a diffusers folder: their shapes, and which conditions they take and from where."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ptq_exp.diffusion.conditions import ConditionTable
from ptq_exp.diffusion.denoisers import LabelledUNet, UNetDenoiser
from ptq_exp.diffusion.zoo.components import load_component
from ptq_exp.diffusion.zoo.network import Shape, check_estimate, component_settings, hollow, state_shape
from ptq_exp.diffusion.zoo.settings import Settings, whole
from ptq_exp.errors import ConfigError

CLASSES = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel)}
_TENSORS = ("encoder_hidden_states", "encoder_attention_mask", "attention_mask", "class_labels", "timestep_cond")
"""Arguments of their forwards that are tensors [N, ...]."""
_NEEDS_MORE = ("image", "text_image", "image_hint", "text_time", "image_proj", "text_image_proj", "ip_image_proj")
"""Kinds of further embeddings whose inputs are no tensor of a name of its own."""


class UNet(NamedTuple):
    """A U-Net of a folder, not yet loaded.

    Attributes:
        settings: its `config.json`.
        cls: of diffusers.
        shape: (C, H, W) of a state.
        classes: labels that it takes, 0 = none, 1 = always the same one.
        blocks: globs of the modules that reconstruction takes as one piece.
    """

    settings: Settings
    cls: type[nn.Module]
    shape: Shape
    classes: int
    blocks: tuple[str, ...]

    def load(self, index: Settings, dtype: torch.dtype) -> nn.Module:
        """Read the denoiser of this U-Net, in float32 or, where its weights stay in their files, in `dtype`."""
        unet = load_component(self.cls, index.root, "unet", wanted=dtype)
        if self.classes == 0:
            return UNetDenoiser(unet)
        return LabelledUNet(unet, default_label=0 if self.classes == 1 else None)


def read_unet(index: Settings, conditions: ConditionTable | None = None) -> UNet:
    """`config.json` of the U-Net, checked with the conditions that the user gives.

    Raises:
        CheckpointError: of an unknown kind, or settings that make no network of such states.
        ConfigError: it takes a condition that is not given, or none of such a name or shape.
    """
    settings, kind = component_settings(index, "unet", CLASSES)
    cls = CLASSES[kind]
    config = settings.of(cls)
    if config["time_embedding_type"] != "positional":
        raise settings.error(f"its U-Net has {config['time_embedding_type']} time embeddings (time_embedding_type); "
                             "only models of discrete time steps are known")
    for key in ("addition_embed_type", "encoder_hid_dim_type"):
        if config.get(key) in _NEEDS_MORE:
            raise settings.error(f"{key}={config[key]}: networks that take more than tensors [N, ...] are not known")
    shape = state_shape(settings, config)
    network = hollow(settings, cls, config)
    given = {} if conditions is None else dict(conditions.rows)
    needed = _needed(config)
    _check_names(settings, cls, needed, given)
    classes = 0 if "class_labels" in given else _classes(settings, config)
    example = {name: rows[:1].to("meta") for name, rows in given.items()}
    if classes:
        example["class_labels"] = torch.zeros(1, dtype=torch.long, device="meta")
    check_estimate(settings, UNetDenoiser(network), shape, **example)
    return UNet(settings, cls, shape, classes, _blocks(config))


def _classes(settings: Settings, config: Mapping[str, Any]) -> int:
    """How many labels the network takes; 0 = it takes none."""
    if config["class_embed_type"] is not None or config["num_class_embeds"] is None:
        return 0
    return settings.require("num_class_embeds", config["num_class_embeds"], whole, "the number of classes")


def _needed(config: Mapping[str, Any]) -> dict[str, str]:
    """{argument: what it is, and which setting says so} of what the network takes and no folder holds."""
    needed = {}
    types = [*config["down_block_types"], *config["up_block_types"], config.get("mid_block_type") or ""]
    if "cross_attention_dim" in config and any("CrossAttn" in name for name in types):
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        needed["encoder_hidden_states"] = f"[K, tokens, {width}], embedded prompts or classes (cross_attention_dim)"
    if (kind := config["class_embed_type"]) is not None:
        width = "" if kind == "timestep" else ", channels"
        needed["class_labels"] = f"[K{width}] (class_embed_type={kind})"
    return needed


def _check_names(
    settings: Settings, cls: type[nn.Module], needed: Mapping[str, str], given: Mapping[str, Tensor]
) -> None:
    """ConfigError for a condition that the network needs and is not given, or does not take."""
    for name, what in needed.items():
        if name not in given:
            raise ConfigError(
                f"model.checkpoint={settings.root}: {settings.file}: the network takes {name}, which is not in the "
                f"folder: set model.conditions to an .npz file that holds {name} {what}; sample i takes one of the K"
            )
    possible = [name for name in _TENSORS if name in inspect.signature(cls.forward).parameters]
    for name in given:
        if name not in possible:
            raise ConfigError(f"model.conditions: the {cls.__name__} of {settings.root} takes no {name}; it takes "
                              f"{', '.join(possible)}")


def _blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Attention with a text stands in transformer blocks, other attention by itself."""
    return ("*resnets.*", "*transformer_blocks.*" if "cross_attention_dim" in config else "*attentions.*")
