"""A saved component of a pipeline: the quantized network alone, and the whole pipeline around it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ptq_exp.deploy.arguments import dtype_of
from ptq_exp.deploy.artifact import PIPELINE_FILE, Artifact
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.deploy.restore import restored
from ptq_exp.errors import DataError, PTQError, one_line
from ptq_exp.pipelines import PipelineModel, RecordedModel
from ptq_exp.quantization.offload import fill_
from ptq_exp.quantization.save import DESCRIPTION_FILE, changed
from ptq_exp.storage.plain_json import read_json

log = logging.getLogger("ptq_exp")


def quantized_component(artifact: Artifact, component: nn.Module) -> QuantizedModel:
    """Turn `component` in place into the quantized one that was saved; it is called as before.

    Args:
        component: of the class and size that was quantized, of any weights.

    Raises:
        DataError: it is of another class or size, or a file is damaged.
    """
    found, expected = type(component).__name__, artifact.description["network"].get("class")
    if found != expected:
        raise DataError(f"{artifact.folder} holds a quantized {expected}, this is a {found}: load it as {expected}")
    example = artifact.arguments("example")
    try:
        model = RecordedModel(component.eval().requires_grad_(False), [example], artifact.identity["name"])
    except PTQError:
        raise
    except Exception as error:  # of any kind: another size ends in whatever torch says
        message = f"{artifact.folder} was quantized from a {expected} of other sizes: {one_line(error)}"
        raise DataError(message) from error
    model.digest = _digest(artifact)
    scale = artifact.description["grid"].get("guidance_scale", 1.0)
    device = next(component.parameters()).device
    return restored(artifact, model, artifact.grid(), scale, device, full_precision=False)


def load_pipeline(artifact: Artifact, device: torch.device | str) -> QuantizedModel:
    """Load the whole pipeline whose component `artifact` is.

    Raises:
        DataError: the pipeline around it is not there, or is another one, or the folder changed meanwhile.
    """
    from diffusers import DiffusionPipeline

    folder, entry = artifact.folder.parent, artifact.arguments("pipeline")
    if not (folder / PIPELINE_FILE).is_file():
        raise DataError(
            f"{artifact.folder} is a component alone, {PIPELINE_FILE} is missing beside its folder: copy the whole "
            "folder that was saved, or give network="
        )
    # a component that is left out, such as the third text encoder of SD3, must be said to be
    absent = {name: None for name, value in read_json(folder / PIPELINE_FILE).items() if value == [None, None]}
    dtypes = {"default": torch.float32, **entry["dtypes"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions call it dtype, older ones torch_dtype alone
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True, **absent)
    name = entry["component"]
    quantizer = getattr(getattr(pipeline, name, None), "hf_quantizer", None)
    if quantizer is None:
        raise DataError(f"{folder}: its {name} is not the quantized one; copy the whole folder that was saved again")
    quantized = quantizer.quantized
    if quantized.model.digest != _digest(artifact):
        raise changed(artifact.folder)
    pipeline.to(device)
    model = PipelineModel(
        pipeline, entry["requests"] or None, steps=entry["steps"], component=name, call=entry["call"],
        name=artifact.identity["name"],
    )
    model.digest, model.denoiser.component = quantized.model.digest, quantized.network.component
    setattr(model.pipeline, name, quantized.network.component)
    grid, scale = model.time_grid(), quantized.guidance_scale
    artifact.check_grid(grid, scale)
    return replace(quantized, model=model, network=model.denoiser, grid=grid)


def loaded_component(component: nn.Module, folder: Path) -> QuantizedModel:
    """Make the quantized model of a component that diffusers has built of its config.json, without weights.

    Raises:
        DataError: see `quantized_component`; or a type that was saved is damaged.
    """
    artifact = Artifact.open(folder)
    entry = artifact.description["network"]
    try:
        usual = dtype_of(entry["dtype"])
        others = {name: dtype_of(kind) for name, kind in entry["other_dtypes"].items()}
    except (KeyError, AttributeError, DataError) as error:
        raise DataError(f"{artifact.folder / DESCRIPTION_FILE} is damaged: network: {one_line(error)}") from error
    fill_(component, lambda name: others.get(name, usual))
    return quantized_component(artifact, component)


def _digest(artifact: Artifact) -> str:
    return f"quantized-{artifact.digest}"
