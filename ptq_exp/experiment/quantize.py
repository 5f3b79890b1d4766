"""Quantize a model that is in memory, with the settings that the command has: for `ptq_exp.quantize`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import DiffusionModel, check_network
from ptq_exp.experiment.choices import Choices
from ptq_exp.experiment.experiment import forecast_experiment
from ptq_exp.experiment.forecast import Forecast
from ptq_exp.experiment.making import make_quantized
from ptq_exp.experiment.run import Run, bytes_of
from ptq_exp.experiment.stage import Record, Stages
from ptq_exp.quantization import group_bits
from ptq_exp.settings.compose import composed_from
from ptq_exp.settings.overrides import quoted
from ptq_exp.storage.cache import ArtifactCache

log = logging.getLogger("ptq_exp")


def quantize_with(
    model: DiffusionModel, overrides: Sequence[str], *, steps: int | None = None, guidance_scale: float | None = None,
    progress: bool = True, folder: Path | None = None,
) -> QuantizedModel:
    """Make the quantized model that the command makes with `overrides`.

    Args:
        folder: where a call that was killed goes on; None = nothing is left on disk.
        steps, guidance_scale: of the sampler; None = the model's own.

    Raises:
        PTQError: one line that names the setting, as on the command line.
    """
    grid = model.time_grid(steps)
    scale = model.sampler.guidance_scale if guidance_scale is None else guidance_scale
    device = next(model.denoiser.parameters()).device
    given = [*overrides, f"sampler.steps={len(grid)}", f"cache={'off' if folder is None else 'on'}",
             f"trainer.progress_bar={str(progress).lower()}"]
    config = composed_from([*given, f"trainer.accelerator={'cpu' if device.type == 'cpu' else 'gpu'}"])
    trainer = {"accelerator": config.trainer.accelerator, "devices": 1, "strategy": "auto", "progress_bar": progress}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="ptq_exp_") as root:
        cache = ArtifactCache(root, config.cache)
        run = Run(
            model, grid, scale, config.seed, device, cache, None, trainer,
            max_memory=bytes_of(config.trainer.max_memory_gb),
        )
        check_network(model, grid, config.seed, device)
        stages = Stages(cache, _Unwritten())
        with torch.random.fork_rng():
            return make_quantized(run, config, stages, None, Choices.of(run, config))[0]


def forecast_with(overrides: Sequence[str]) -> Forecast | None:
    """Forecast what the command would take with `overrides`; see `forecast_experiment`."""
    return forecast_experiment(composed_from(overrides), Path("runs"))


class _Unwritten:
    """Takes the records of stages, which here nobody reads."""

    def write(self, stage: str, record: Record, **numbers: Any) -> None:
        """Log the seconds of a stage."""
        log.info("%s: %s s", stage, numbers.get("seconds", {}).get(stage))


def bits_overrides(bits: str) -> list[str]:
    """Return the choice of bits as overrides; "nvfp4:8" names a width or number format of weights and of activations.

    Raises:
        ConfigError: it names something else.
    """
    if ":" not in str(bits):
        return [f"bits={bits}"]
    weight, activation = group_bits("bits", bits)
    return ["bits=w8a8", f"bits.name={weight}_{activation}", f"bits.weight={weight}", f"bits.activation={activation}"]


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings by name as overrides of the command line; those that are None are left out."""
    return [f"{name}={_written(value)}" for name, value in settings.items() if value is not None]


def _written(value: Any, inside: bool = False) -> str:
    """Return a value as the command line has it: lists and mappings in its notation, texts in them in quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(part, True)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(part, True) for part in value) + "]"
    if inside and isinstance(value, str):
        return quoted(value)
    return "null" if inside and value is None else str(value)
