"""Pipelines in local folders and single files, opened without running their code and without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ptq_exp.diffusion.zoo.build import torch_dtype
from ptq_exp.diffusion.zoo.components import load_component
from ptq_exp.diffusion.zoo.place import INDEX, local_folder
from ptq_exp.diffusion.zoo.room import require_room
from ptq_exp.diffusion.zoo.settings import Settings
from ptq_exp.errors import CheckpointError, one_line
from ptq_exp.pipelines.model import PipelineModel
from ptq_exp.pipelines.prompts import Request
from ptq_exp.pipelines.refusals import check_file, check_folder, components_of
from ptq_exp.pipelines.single_file import open_file

_NAME = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


def pipeline_folder(
    checkpoint: str, *, name: str = "pipeline", prompts: Sequence[str | Request] | str | None = None,
    call: Mapping[str, Any] | None = None, component: str | None = None, steps: int | None = None,
    guidance_scale: float | None = None, eta: float | None = None, config: str | None = None, dtype: str = "float32",
    asked: Sequence[int] | None = None,
) -> PipelineModel:
    """Return a pipeline in a local folder, or in a single file, as a model; nothing is downloaded.

    Args:
        checkpoint: folder with a `model_index.json`, or a `.safetensors` file of Stable Diffusion, SDXL, FLUX or
            another model that diffusers reads from one file.
        prompts, call, component, steps, guidance_scale, eta, name, asked: see `PipelineModel`.
        config: of a single file, the folder of its pipeline's settings; None = the hub's cache.
        dtype: of all networks: float32, bfloat16, float16 or float64.

    Raises:
        CheckpointError: no such folder or file, one that is not complete, quantized already, pickled, or made for code
            of its own.
        ConfigError: an unknown dtype; what `PipelineModel` finds wrong; no room for weights of other types than `dtype`
            (`mapped_weights`).
        DataError: the file of prompts cannot be read.
    """
    pipeline = open_pipeline(checkpoint, torch_dtype(dtype), config)
    return PipelineModel(
        pipeline, prompts, name=name, call=call, component=component, steps=steps, guidance_scale=guidance_scale,
        eta=eta, asked=asked,
    )


def open_pipeline(checkpoint: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Any:
    """Return the pipeline in a folder or file, its networks in evaluation mode; see `pipeline_folder`."""
    path = Path(checkpoint)
    if path.is_file():
        check_file(path)
        require_room(path, [path], dtype, "model.dtype")
        pipeline = open_file(path, dtype, config, open_folder)
    elif path.is_dir():
        pipeline = open_folder(path, dtype)
    else:
        raise CheckpointError(
            f"model.checkpoint={checkpoint}: no such folder or file; download the pipeline and give its folder"
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def open_folder(path: Path, dtype: torch.dtype, **given: nn.Module) -> Any:
    """Return the pipeline of a folder; `given` components are not read from it."""
    root = local_folder(str(path))
    if not (root / INDEX).exists():
        raise CheckpointError(f"model.checkpoint={path}: a network without {INDEX}: give the folder of its pipeline")
    index = Settings.read(root, INDEX)
    check_folder(index)
    parts = {name: _load(root, name, *of, dtype) for name, of in components_of(index) if name not in given}
    parts = {name: part for name, part in parts.items() if part is not None}
    # a component that is left out, such as the third text encoder of SD3, must be said to be
    parts |= {name: None for name, value in index.values.items() if value == [None, None]}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            root, local_files_only=True, use_safetensors=True, torch_dtype=dtype, **parts, **given
        )
    except Exception as error:  # whatever a damaged folder makes the libraries stumble over
        raise CheckpointError(f"model.checkpoint={root}: not a complete pipeline: {one_line(error, 300)}") from error


def _load(root: Path, name: str, library: str, kind: str, dtype: torch.dtype) -> nn.Module | None:
    """Return a network, all of whose weights are in its folder; None of what is no network of the two libraries.

    Raises:
        CheckpointError: weights are missing, or in a file that cannot be read safely.
        ConfigError: inside `mapped_weights`, they would have to be converted and there is no room for that.
    """
    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if not isinstance(cls, type):
        cls = object
    if issubclass(cls, diffusers.ModelMixin):
        return load_component(cls, root, name, dtype, wanted=dtype)
    variant, files = _weights(root / name)
    require_room(root / name, files, dtype, "model.dtype")  # of any library: what is not converted stays in its file
    if not issubclass(cls, transformers.PreTrainedModel):
        return None
    return _load_transformers(cls, root / name, dtype, variant)


def _weights(folder: Path) -> tuple[str | None, list[Path]]:
    """Return which variant of the weights of a component is loaded, None = the plain ones, and its files."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if (match := _NAME.fullmatch(path.name)) is not None:
            found.setdefault(match["variant"], []).append(path)
    variant = None if None in found else min(filter(None, found), default=None)
    return variant, found.get(variant, [])


def _load_transformers(
    cls: type[nn.Module], folder: Path, dtype: torch.dtype, variant: str | None
) -> nn.Module:
    """Return a text or image encoder; transformers itself would draw weights that are missing."""
    try:
        module, found = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True,
            variant=variant,
        )
    except Exception as error:  # whatever a damaged folder makes the library stumble over
        raise CheckpointError(
            f"model.checkpoint={folder}: not a complete {cls.__name__} of its config.json ({one_line(error, 300)})"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"model.checkpoint={folder}: not a complete {cls.__name__}: {len(missing)} weights are missing "
            f"({', '.join(missing[:3])})"
        )
    return module
