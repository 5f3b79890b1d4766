"""The arguments of a pipeline's call: those of each image, and those for all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ptq_exp.errors import ConfigError, nearest
from ptq_exp.pipelines.prompts import Request

_TEXTS = ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")
_OWN = ("generator", "output_type", "num_inference_steps", "return_dict", "num_images_per_prompt", "batch_size")
"""Arguments that the model sets, or leaves at their defaults."""


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's call by name."""
    parameters = list(inspect.signature(type(pipeline).__call__).parameters.items())[1:]
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in parameters if parameter.kind not in variable}


def is_per_image(name: str) -> bool:
    """Whether an argument has a value for each image: texts and what is made of them, pictures, classes."""
    if "ip_adapter" in name:
        return False
    return name.startswith(_TEXTS) or name.endswith(("image", "_embeds")) or name in ("class_labels", "latents")


def check_arguments(pipeline: Any, call: Mapping[str, Any], requests: Sequence[Request]) -> None:
    """Raise ConfigError for an argument that the pipeline does not take, or a prompt that is missing."""
    taken, kind = parameters_of(pipeline), type(pipeline).__name__
    of_images = requests[0] if requests else {}
    for where, names in (("model.call", call), ("model.prompts", of_images)):
        for name in names:
            if name in _OWN:
                raise ConfigError(f"{where}: {name} is set by the model itself: leave it out")
            if name not in taken:
                raise ConfigError(f"{where}: {kind} takes no {name}; {nearest(name, set(taken) - set(_OWN))}")
    for name in of_images:
        if not is_per_image(name):
            raise ConfigError(f"model.prompts: {name} is one for all images: set model.call.{name}")
        if name in call:
            raise ConfigError(f"model.call.{name} is set for each image by model.prompts: leave one of them out")
    if "prompt" in taken and not {"prompt", "prompt_embeds"} & {*call, *of_images}:
        raise ConfigError(f"model.prompts=null: {kind} draws from prompts; give a file of them, or a list")


def checked_classes(pipeline: Any, component: str, requests: Iterable[Request]) -> int | None:
    """Return how many classes the component of a pipeline that takes labels knows; None of the others.

    Raises:
        ConfigError: a request for a class that it does not know.
    """
    if "class_labels" not in parameters_of(pipeline):
        return None
    classes = getattr(getattr(pipeline, component).config, "num_embeds_ada_norm", None)
    for label in (request["class_labels"] for request in requests if "class_labels" in request):
        whole = isinstance(label, int) and not isinstance(label, bool)
        if classes is not None and not (whole and 0 <= label < classes):
            raise ConfigError(f"model.prompts: there is no class class_labels={label}: choose 0..{classes - 1}")
    return classes


def call_arguments(
    pipeline: Any, requests: Sequence[Request], call: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of one call of `pipeline` for images of these requests, all with the same names.

    Args:
        call: arguments for all images.
        own: further ones, where the pipeline takes them.
    """
    given = {name: _together([request[name] for request in requests]) for name in requests[0]}
    given |= {name: _for_all(name, value, len(requests)) for name, value in call.items()}
    if not any(is_per_image(name) for name in given):
        own = {**own, "batch_size": len(requests)}
    taken = parameters_of(pipeline)
    return given | {name: value for name, value in own.items() if name in taken}


def number(pipeline: Any, call: Mapping[str, Any], name: str, otherwise: float) -> float:
    """Return an argument of the pipeline's call that is a number: as given, or its default."""
    parameter = parameters_of(pipeline).get(name)
    value = call.get(name, otherwise if parameter is None else parameter.default)
    return float(value) if isinstance(value, (int, float)) else otherwise


def sampler_arguments(pipeline: Any, **settings: float | None) -> dict[str, float]:
    """Return the arguments of the call for settings of the sampler by name, those that are not None.

    Raises:
        ConfigError: one that the pipeline does not take.
    """
    found = {name: value for name, value in settings.items() if value is not None}
    for name, value in found.items():
        if name not in parameters_of(pipeline):
            raise ConfigError(f"sampler.{name}={value}: {type(pipeline).__name__} takes no {name}; leave it out")
    return found


def _together(values: list[Any]) -> Any:
    """Return the values of an argument, one for each image; tensors [...] or [1, ...] as one, [N, ...]."""
    if all(isinstance(value, Tensor) for value in values):
        return torch.cat(values) if all(value.ndim > 1 and len(value) == 1 for value in values) else torch.stack(values)
    return values


def _for_all(name: str, value: Any, n: int) -> Any:
    """Return the value of an argument that is the same for all `n` images."""
    if not is_per_image(name):
        return value
    if isinstance(value, Tensor) and len(value) == 1:
        return value.expand(n, *value.shape[1:])
    return [value] * n if isinstance(value, (str, int, Image, np.ndarray)) else value
