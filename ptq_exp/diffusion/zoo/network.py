"""Networks of a diffusers folder: which class, of which shapes, and whether its settings make a network at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ptq_exp.diffusion.zoo.components import component_folder
from ptq_exp.diffusion.zoo.settings import Settings, whole
from ptq_exp.errors import one_line

Shape = tuple[int, int, int]
# DiT was a part of this class once
_ALIASES = {"Transformer2DModel": "DiTTransformer2DModel"}


def component_settings(index: Settings, component: str, known: Iterable[str]) -> tuple[Settings, str]:
    """`config.json` of a component and its class: what the pipeline's index names, or the file itself.

    Raises:
        CheckpointError: no such file, an unknown class, or index and file name different ones.
    """
    entry = index.values.get(component)
    named, known = named_class(index, component), tuple(known)
    if entry is not None and named not in known:
        raise index.error(f"{component}={entry}: known are {', '.join(known)}")
    folder = component_folder(index.root, component)
    file = "config.json" if folder == index.root else f"{component}/config.json"
    if folder == index.root and not (folder / file).exists():
        raise index.error(f"names {component}, but there is no {component}/config.json")
    settings = Settings.read(index.root, file)
    own = _known_as(settings.values.get("_class_name"))
    if own is not None and own not in known:
        raise settings.error(f"_class_name={own}: known are {', '.join(known)}")
    if own is not None and named is not None and own != named:
        raise settings.error(f"_class_name={own}, but {index.file} names {named} as {component}: change one of them")
    kind = own or named
    if kind is None:
        raise settings.error(f"no _class_name, and {index.file} names no {component}: known are {', '.join(known)}")
    return settings, kind


def named_class(index: Settings, component: str) -> str | None:
    """Return the class that a pipeline's index names for a component; it has [null, null] for one that is left out."""
    entry = index.values.get(component)
    return _known_as(entry[-1]) if isinstance(entry, list) and entry else None


def _known_as(name: Any) -> Any:
    return _ALIASES.get(name, name) if isinstance(name, str) else name


def hollow(settings: Settings, cls: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """Return a module of `cls` without weights (meta device): computes shapes alone.

    Raises:
        CheckpointError: the class does not take the settings.
    """
    try:
        with torch.device("meta"):
            return cls(**config).to("meta").eval()
    except Exception as error:  # whatever the library stumbles over
        raise settings.error(f"no {cls.__name__} can be made of it ({one_line(error)})") from error


def state_shape(settings: Settings, config: Mapping[str, Any]) -> Shape:
    """(C, H, W) of what a network reads.

    Raises:
        CheckpointError: a size that is none, a divisor of 0, or an estimate that has not the channels of a state, once,
            or twice with the variance.
    """
    size = config["sample_size"]
    sizes = size if isinstance(size, list) else [size, size]
    settings.require("sample_size", size, lambda _: len(sizes) == 2 and all(map(whole, sizes)),
                     "set it to the height and width of a state, as one number or [height, width]")
    channels = settings.require("in_channels", config["in_channels"], whole, "choose a number of channels, 1 or more")
    settings.require(
        "out_channels", config["out_channels"], lambda out: out in (None, channels, 2 * channels),
        f"in_channels={channels}: an estimate of the noise has as many, or twice as many with that of the variance",
    )
    for key in ("norm_eps", "mid_block_scale_factor"):
        settings.require(key, config.get(key, 1), lambda divisor: divisor > 0, "choose a positive number")
    return channels, *sizes


def check_estimate(settings: Settings, denoiser: nn.Module, shape: Shape, **conditions: torch.Tensor) -> None:
    """CheckpointError unless `denoiser`, on the meta device, takes a state of this `shape` and returns its size."""
    x, t = torch.empty(1, *shape, device="meta"), torch.zeros(1, device="meta")
    try:
        found = tuple(denoiser(x, t, **conditions).shape[2:])
    except Exception as error:  # whatever the library stumbles over
        others = "".join(f", and {name} of {tuple(value.shape)}" for name, value in conditions.items())
        raise settings.error(f"the network does not take a state of {shape} (channels, height, width), which "
                             f"in_channels and sample_size say{others} ({one_line(error)})") from error
    if found != shape[1:]:
        raise settings.error(f"sample_size={list(shape[1:])}: the network returns {list(found)}; choose a size that "
                             "its levels or patches divide")
