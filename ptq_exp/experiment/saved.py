"""Quantized models as files: saved by a run, evaluated by another one, or loaded for sampling in Python."""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import ptq_exp
from ptq_exp.deploy.artifact import (
    OF_MODEL,
    SCHEDULE_FILE,
    SECTIONS,
    STATISTICS_FILE,
    SUBFOLDER,
    Artifact,
    grid_account,
)
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import DiffusionModel
from ptq_exp.diffusion.zoo import folder_of_structure, is_local
from ptq_exp.diffusion.zoo.build import RandomWeightsWarning
from ptq_exp.diffusion.zoo.registry import MODELS, load_model
from ptq_exp.errors import CheckpointError, ConfigError, DataError, PTQError
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.twin import Twin
from ptq_exp.quantization.save import DESCRIPTION_FILE, TENSORS_FILE, load_quantized_, save_quantized
from ptq_exp.settings.compose import from_settings
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.paths import with_homes
from ptq_exp.storage.plain_json import to_plain

log = logging.getLogger("ptq_exp")


def save_twin(setup: Setup, twin: Twin, evaluations: int, run_folder: Path) -> dict[str, Any]:
    """Write the twin to the sub-folder `quantized` of its run folder, and quantization.json to the latter too.

    Args:
        evaluations: of the network, that calibration took.
        run_folder: already holds bit schedule and noise statistics, where there are any.

    Returns:
        The content of quantization.json.
    """
    folder = run_folder / SUBFOLDER
    folder.mkdir(parents=True, exist_ok=True)
    beside = {}
    for key, name, there in (
        ("bit_schedule", SCHEDULE_FILE, twin.schedule), ("noise_statistics", STATISTICS_FILE, twin.statistics)
    ):  # fmt: skip
        beside[key] = None
        if there is not None:
            shutil.copyfile(run_folder / name, folder / name)
            beside[key] = {"file": name, "sha256": file_digest(folder / name)}
    about = _account(setup, evaluations) | beside | {"transforms": [made.to_dict() for made in twin.transforms]}
    description = save_quantized(folder, twin.network, twin.rules, twin.report, to_plain(about))
    shutil.copyfile(folder / DESCRIPTION_FILE, run_folder / DESCRIPTION_FILE)
    size = description["file"]
    log.info(
        "%s: %.3f MB, %+.1f %% of the theoretical %.3f MB", TENSORS_FILE, size["bytes"] / 1e6,
        100 * (size["bytes"] / size["theoretical_bytes"] - 1), size["theoretical_bytes"] / 1e6,
    )  # fmt: skip
    return description


def load_twin(setup: Setup) -> Twin:
    """The saved twin that `setup` evaluates; the model's own denoiser is left alone."""
    try:
        twin = _restored(setup, replace_denoiser=False)
    except DataError as error:
        raise DataError(f"quantized={setup.config.quantized}: {error}") from error
    log.info("quantized model: loaded from %s", setup.artifact.folder)
    return twin


def load_quantized(
    path: str | Path, checkpoint: str | None = None, device: torch.device | str = "cpu", *,
    model: DiffusionModel | None = None,
) -> QuantizedModel:  # fmt: skip
    """Load a saved quantized model, without calibration data; its network gives the saved one's outputs bit for bit.

    Args:
        path: a run folder, or its sub-folder `quantized`, wherever it was copied to.
        checkpoint: the full-precision file, folder or repository id that the model was made from. None = the one in
            the artefact, where it is there (a repository: in the local cache). Without it a model without first stage
            is complete, but its full-precision network is not there.
        device: where to compute.
        model: the full-precision model, for models that `load_model` does not know.

    Raises:
        DataError: the artefact is missing, truncated, edited or of an unknown version.
        CheckpointError: the checkpoint is another one, or is needed for the first stage (or for the structure of the
            network of a diffusers folder, which earlier versions did not save).
    """
    artifact = Artifact.open(with_homes(path, "quantized"))
    config = from_settings(artifact.settings, f"{artifact.folder / DESCRIPTION_FILE}")
    config.model.compile = False
    full_precision = True
    if model is None:
        model, full_precision = _build(artifact, checkpoint)
    else:
        artifact.check_model(model, "model")
    if config.model.channels_last:
        model.denoiser.to(memory_format=torch.channels_last)
    if model.first_stage is not None:
        model.first_stage.to(device)
    sampler = config.sampler
    grid = model.time_grid(sampler.steps, sampler.spacing, eta=sampler.eta, solver=sampler.solver)
    setup = Setup(config, model, grid, None, ArtifactCache("", "off"), torch.device(device), artifact)
    artifact.check_grid(grid, setup.guidance_scale)
    twin = _restored(setup, replace_denoiser=not full_precision)
    return QuantizedModel(
        model, twin.network, twin.corrected(setup), grid, setup.guidance_scale, twin.report, twin.noise_in_eps(setup),
        full_precision,
    )  # fmt: skip


def _restored(setup: Setup, *, replace_denoiser: bool) -> Twin:
    """The twin in the files; `replace_denoiser`: it becomes the model's denoiser, whose weights are of no use."""
    model, artifact = setup.model, setup.artifact
    network = (model.denoiser if replace_denoiser else model.twin()).to(setup.device)
    example = tuple(part.to(setup.device) for part in model.example_inputs())
    transforms = artifact.transforms()
    for made in transforms:
        made.install_(network)
    report = load_quantized_(network, artifact.folder, example)
    schedule, widths = artifact.schedule(), setup.activation_widths
    if schedule is not None and len(widths) > 1:
        report = report.mixed(schedule.shares(widths))
    return Twin(network, report, schedule, artifact.statistics(), transforms=transforms)


def _build(artifact: Artifact, checkpoint: str | None) -> tuple[DiffusionModel, bool]:
    """The model that was quantized, and whether its full-precision weights are there."""
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
    """The full-precision model; None = of the weights that its builder has without a checkpoint.

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
    """A model of the same structure; None where neither the artefact nor the name of the model says it.

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


def _account(setup: Setup, evaluations: int) -> dict[str, Any]:
    """What quantization.json says of model, sampler and recipe."""
    config = setup.config
    settings = {key: value for key, value in asdict(config).items() if key in SECTIONS}
    settings["model"] = {key: settings["model"][key] for key in OF_MODEL}
    built_by_others = ("_target_", "name", "checkpoint", "dtype")
    return {
        "ptq_exp": ptq_exp.__version__,
        "model": {
            "name": config.model.name,
            "digest": setup.model.digest,
            "target": config.model.build.get("_target_"),
            "dtype": config.model.dtype,
            "structure": setup.model.structure if MODELS.get(config.model.name) == MODELS["diffusers"] else None,
            "first_stage": setup.model.first_stage is not None,
            "options": {key: value for key, value in config.model.build.items() if key not in built_by_others},
        },
        "grid": grid_account(setup.grid, setup.guidance_scale),
        "activation_widths": setup.activation_widths,
        "evaluations": evaluations,
        "settings": settings,
    }
