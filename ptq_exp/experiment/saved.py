"""What a quantized model was made from and with, to be saved beside it; and the stage that loads one to evaluate it."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import ptq_exp
from ptq_exp.deploy.artifact import OF_MODEL, SECTIONS, Artifact
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.deploy.restore import restored
from ptq_exp.diffusion import DiffusionModel
from ptq_exp.diffusion.zoo.registry import MODELS
from ptq_exp.errors import naming
from ptq_exp.experiment.run import PARTS, Run
from ptq_exp.quantization.offload import placing
from ptq_exp.settings.schema import ExperimentConfig

log = logging.getLogger("ptq_exp")

_BUILT_BY_OTHERS = ("_target_", "name", "checkpoint", "dtype")


def load_saved(run: Run, saved: Artifact, path: str) -> QuantizedModel:
    """Load the saved quantized model that `quantized=path` names; the model's own denoiser is left alone."""
    with naming(f"quantized={path}: "), placing(run.max_memory, run.cache.root / PARTS):
        quantized = restored(saved, run.model, run.grid, run.guidance_scale, run.device, compiled=run.compile)
    log.info("quantized model: loaded from %s", saved.folder)
    return replace(quantized, cuda_graph=run.cuda_graph)


def recipe(config: ExperimentConfig, model: DiffusionModel, evaluations: int) -> dict[str, Any]:
    """Describe what a quantized model is made from and with, for its quantization.json.

    Args:
        evaluations: of the network, that calibration took.
    """
    settings = {key: value for key, value in asdict(config).items() if key in SECTIONS}
    settings["model"] = {key: settings["model"][key] for key in OF_MODEL}
    return {
        "ptq_exp": ptq_exp.__version__,
        "model": {
            "name": config.model.name,
            "digest": model.digest,
            "target": config.model.build.get("_target_"),
            "dtype": config.model.dtype,
            "structure": model.structure if MODELS.get(config.model.name) == MODELS["diffusers"] else None,
            "first_stage": model.first_stage is not None,
            "options": {key: value for key, value in config.model.build.items() if key not in _BUILT_BY_OTHERS},
        },
        "evaluations": evaluations,
        "settings": settings,
    }
