"""Saved quantized models, loaded: with the network's full-precision weights where they are, without them elsewhere."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq_exp.deploy.artifact import Artifact
from ptq_exp.deploy.component import load_pipeline, quantized_component
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.deploy.restore import restored
from ptq_exp.diffusion import DiffusionModel
from ptq_exp.diffusion.zoo.build import RandomWeightsWarning
from ptq_exp.diffusion.zoo.place import is_local
from ptq_exp.diffusion.zoo.registry import MODELS, load_model
from ptq_exp.diffusion.zoo.structure import folder_of_structure
from ptq_exp.errors import CheckpointError, ConfigError, PTQError
from ptq_exp.quantization.offload import copy_of, placing
from ptq_exp.quantization.save import DESCRIPTION_FILE
from ptq_exp.runtime.base import check_runtime
from ptq_exp.storage.paths import with_homes

log = logging.getLogger("ptq_exp")


def load_quantized(
    path: str | Path, checkpoint: str | None = None, device: torch.device | str = "cpu", *,
    model: DiffusionModel | None = None, network: nn.Module | None = None, runtime: str = "simulate",
    runtime_options: Mapping[str, Any] | None = None, max_memory_gb: float | None = None,
    folder: str | Path | None = None,
) -> QuantizedModel:
    """Load a saved quantized model, without calibration data; its network gives the saved one's outputs bit for bit.

    Args:
        path: a run folder, its sub-folder `quantized`, or what `QuantizedModel.save` wrote, wherever it was copied to.
        checkpoint: the full-precision file, folder or repository id that the model was made from. None = the one in
            the artefact, where it is there (a repository: in the local cache). Without it a model without first stage
            is complete, but its full-precision network is not there.
        device: where to compute.
        model: the full-precision model, for models that `load_model` does not know.
        network: a module of the class and size that was quantized, of any weights, where that was a network with
            recorded calls; it stays as it is.
        runtime: how the network is executed, see `ptq_exp.runtime`.
        runtime_options: such as {"precision": "bf16"} of openvino; None = the defaults.
        max_memory_gb: keep weights of more than so many GB in files, from which a block at a time is read; None = in
            memory. On a CPU.
        folder: for these files; they take no room there once the model is gone. None = that for temporary files.

    Raises:
        ConfigError: there is no such runtime.
        DataError: the artefact is missing, truncated, edited or of an unknown version.
        CheckpointError: the checkpoint is another one, or is needed for the first stage (or for the structure of the
            network of a diffusers folder, which earlier versions did not save).
    """
    check_runtime(runtime)
    limit, room = bytes_on(device, max_memory_gb), Path(tempfile.gettempdir() if folder is None else folder)
    with placing(limit, room):
        artifact = Artifact.open(with_homes(path, "quantized"))
        return load_opened(artifact, checkpoint, device, model, network).on(runtime, runtime_options)


def bytes_on(device: torch.device | str, max_memory_gb: float | None) -> float | None:
    """Return `max_memory_gb` as bytes.

    Raises:
        ConfigError: the device is no CPU: its memory holds no mapped files.
    """
    if max_memory_gb is not None and torch.device(device).type != "cpu":
        raise ConfigError(f"max_memory_gb={max_memory_gb}: weights in files are for device=cpu, not {device}")
    return None if max_memory_gb is None else 1e9 * max_memory_gb


def load_opened(
    artifact: Artifact, checkpoint: str | None = None, device: torch.device | str = "cpu",
    model: DiffusionModel | None = None, network: nn.Module | None = None,
) -> QuantizedModel:
    """Load the model of an opened artefact; see `load_quantized`."""
    if model is None and artifact.description.get("network") is not None:
        return _load_called(artifact, checkpoint, network, device)
    if network is not None:
        raise ConfigError(f"network=: {artifact.folder} is no network with recorded calls; leave it out")
    full_precision = True
    if model is None:
        model, full_precision = _build(artifact, checkpoint)
    else:
        artifact.check_model(model, "model")
    if artifact.setting("model.channels_last", bool, False):
        model.denoiser.to(memory_format=torch.channels_last)
    if model.first_stage is not None:
        model.first_stage.to(device)
    steps, spacing = artifact.setting("sampler.steps", int, 0), artifact.setting("sampler.spacing", str | None, None)
    eta, solver = artifact.setting("sampler.eta", float | int, 0), artifact.setting("sampler.solver", str, "ddim")
    grid = model.time_grid(steps, spacing, eta=float(eta), solver=solver)
    scale = artifact.setting("sampler.guidance_scale", float | int | None, None)
    scale = model.sampler.guidance_scale if scale is None else float(scale)
    artifact.check_grid(grid, scale)
    return restored(artifact, model, grid, scale, torch.device(device), full_precision=full_precision)


def _load_called(
    artifact: Artifact, checkpoint: str | None, network: nn.Module | None, device: torch.device | str
) -> QuantizedModel:
    """Load a component of a pipeline, and the pipeline around it, or a network with recorded calls."""
    if checkpoint is not None:
        raise ConfigError(f"checkpoint=: {artifact.folder} needs no other weights than its own; leave it out")
    if network is not None:
        return quantized_component(artifact, copy_of(network).to(device))
    if artifact.description.get("pipeline") is None:
        raise ConfigError(
            f"{artifact.folder} is a network alone: give network=, a {artifact.description['network'].get('class')} of "
            "the size that was quantized, with any weights"
        )
    return load_pipeline(artifact, device)


def _build(artifact: Artifact, checkpoint: str | None) -> tuple[DiffusionModel, bool]:
    """Build the model that was quantized, and whether its full-precision weights are there."""
    name, recorded = artifact.identity["name"], artifact.checkpoint
    if name not in MODELS or artifact.identity.get("target") != "ptq_exp.load_model":
        raise ConfigError(
            f"{artifact.folder}: {name} is no model of load_model: import the module that registers it, or build it "
            "and give model="
        )
    if checkpoint is not None:
        return _of_checkpoint(artifact, checkpoint), True
    here, reason = recorded is None or is_local(recorded), ""
    if here:
        try:
            return _of_checkpoint(artifact, recorded), True
        except PTQError as error:
            reason = f" ({error})"
    model = _of_random_weights(artifact)
    if model is not None and model.first_stage is None:
        if here and recorded is not None:
            log.warning("%s is loaded without its full-precision network%s", artifact.folder, reason)
        return replace(model, digest=f"quantized-{artifact.digest}"), False
    if not here:  # a repository may be within reach
        try:
            return _of_checkpoint(artifact, recorded), True
        except PTQError as error:
            reason = f" ({error})"
    lacking = "structure" if model is None else "first stage"
    raise CheckpointError(
        f"{artifact.folder}: the {lacking} of {name} is not in the artefact: give checkpoint=, the file or folder that "
        f"it was made from (digest {artifact.identity['digest'][:12]}){reason}"
    )


def _of_checkpoint(artifact: Artifact, checkpoint: str | None) -> DiffusionModel:
    """Return the full-precision model; None = of the weights that its builder has without a checkpoint.

    Raises:
        CheckpointError, ConfigError: it cannot be read, or has other weights than those that were quantized.
    """
    identity = artifact.identity
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)  # the digest says whether they are the right ones
            model = load_model(identity["name"], checkpoint, dtype=identity["dtype"], **identity["options"])
    except PTQError as error:
        raise type(error)(str(error).replace("model.checkpoint=", "checkpoint=")) from error
    artifact.check_model(model, "checkpoint")
    return model


def _of_random_weights(artifact: Artifact) -> DiffusionModel | None:
    """Return a model of the same structure; None where neither the artefact nor the name of the model says it.

    Raises:
        DataError: the structure in the artefact is damaged.
    """
    identity, structure = artifact.identity, artifact.structure
    name, settings = identity["name"], {"dtype": identity["dtype"], **identity["options"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)  # the weights come from the artefact
        if structure is not None and MODELS[name] == MODELS["diffusers"]:
            with folder_of_structure(structure, f"{artifact.folder / DESCRIPTION_FILE}: model.structure") as folder:
                return load_model(name, folder, **settings)
        try:
            return load_model(name, **settings)
        except PTQError:
            return None
