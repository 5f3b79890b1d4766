"""Quantizing and sampling in one call, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ptq_exp.deploy.draw import draw
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import DiffusionModel, check_network
from ptq_exp.diffusion.zoo.build import DTYPES
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.pipelines import PipelineModel, RecordedModel

if TYPE_CHECKING:
    from ptq_exp.experiment.forecast import Forecast

STATES, TRAJECTORIES = 256, 16


def quantize(
    model: Any, bits: str, *, prompts: Sequence[Any] | str | None = None, calls: Sequence[Any] | None = None,
    n: int | None = None, steps: int | None = None, calibration: str = "uniform", metric: str = "mse",
    policy: str | Mapping[str, Any] | None = None, reconstruction: str | None = None,
    transforms: Sequence[str | Mapping[str, Any]] = (), runtime: str = "simulate", seed: int = 0,
    max_memory_gb: float | None = None, folder: str | Path | None = None, progress: bool = True, **call: Any,
) -> QuantizedModel:
    """Quantize a pipeline of diffusers, a `DiffusionModel`, or any network with recorded calls; `model` is untouched.

    Args:
        bits: such as "w8a8" or "mxfp4", a name in conf/bits; or "nvfp4:8", a width or number format of weights and one
            of activations (16: these are not quantized).
        prompts: of a pipeline: what calibration draws, texts or arguments by name for each image, or a file of them.
        calls: of a network: arguments of its calls, each a mapping by name, or in order with a mapping at the end.
        n: calibration states: network calls that ranges are chosen on, a row each (of a pipeline: those of one image).
            None = 256 of a model; of a pipeline, every step of as many images as there are prompts, 16 at most.
        steps: sampling steps; None = the model's own (20 of a pipeline).
        calibration, metric, reconstruction, runtime: choices of these groups, as on the command line.
        policy: a choice of the group `quantization`, or its settings by name, such as {"shortcut": "split_all"}.
        transforms: such as ("smooth", {"name": "low_rank", "rank": 16}), in order.
        seed: of the noise that calibration starts from.
        max_memory_gb: quantize block by block, with weights and states on disk, a network whose weights do not fit in
            so many GB twice; None = in memory. The result is the same.
        folder: where weights and states lie then, and where a call that was killed goes on when it is made again; None
            = a folder for temporary files.
        progress: show progress bars.
        call: further arguments of the pipeline's call, such as height=512; of a model, guidance_scale.

    Returns:
        The quantized model. Of a pipeline, `quantized.pipeline` is used as the original one; `quantized.component`
        is the network as the pipeline calls it.

    Raises:
        PTQError: one line that says which argument cannot be, and what is valid.
    """
    from ptq_exp.experiment.quantize import bits_overrides, overrides_of, quantize_with  # loads Hydra and Lightning

    wanted, scale = _model_of(model, prompts, calls, steps, call)
    settings = {
        "calibration": calibration, "metric": metric, "reconstruction": reconstruction,
        "runtime": runtime, "seed": seed, "trainer.max_memory_gb": max_memory_gb,
    }
    if isinstance(policy, str):
        settings["quantization"] = policy
    own = dict(policy) if isinstance(policy, Mapping) else {}
    own |= {"transforms": list(transforms)} if transforms else {}
    given = [
        *bits_overrides(bits), *overrides_of(settings | {f"quantization.{key}": value for key, value in own.items()})
    ]
    return quantize_with(
        wanted, [*_model_overrides(wanted), *given, *_sizes(wanted, n)], guidance_scale=scale, progress=progress,
        folder=None if folder is None else Path(folder), steps=steps if type(wanted) is DiffusionModel else None,
    )


def forecast(*overrides: str) -> Forecast | None:
    """Say what a run of the command would take, before it runs: seconds of each stage, memory, disk.

    Args:
        overrides: as on the command line, such as "+experiment=ndtc_w8a8", "bits=w4a8".

    Returns:
        The forecast; `table()` is for reading. None where none can be made, such as of pipelines; the log says why.

    Raises:
        PTQError: the run cannot be made of these settings, or memory or disk do not suffice.
    """
    from ptq_exp.experiment.quantize import forecast_with

    return forecast_with(overrides)


def _model_of(
    model: Any, prompts: Any, calls: Any, steps: int | None, call: dict[str, Any]
) -> tuple[DiffusionModel, float | None]:
    """Return the model that is quantized, and its guidance scale where it is not its own."""
    if isinstance(model, DiffusionModel):
        scale = call.pop("guidance_scale", None)
        _only(call, "a DiffusionModel takes guidance_scale alone")
        if prompts is not None or calls is not None:
            raise ConfigError("prompts and calls are for pipelines and for networks: a DiffusionModel has conditions")
        return model, scale
    if isinstance(model, nn.Module):
        _only(call, "a network takes none")
        if calls is None:
            raise ConfigError(
                f"quantize({type(model).__name__}): of a network alone give calls=, a list of the arguments that it is "
                "called with"
            )
        return RecordedModel(model, calls, type(model).__name__), None
    if not callable(getattr(model, "set_progress_bar_config", None)):
        raise ConfigError(
            f"quantize({type(model).__name__}): give a pipeline of diffusers, a DiffusionModel, or a torch.nn.Module"
        )
    return PipelineModel(model, prompts, steps=steps, call=call, name=type(model).__name__), None


def _only(call: Mapping[str, Any], why: str) -> None:
    if call:
        raise ConfigError(f"quantize({', '.join(call)}): no such argument; {why}")


def _model_overrides(model: DiffusionModel) -> list[str]:
    group = "pipeline" if isinstance(model, (PipelineModel, RecordedModel)) else "diffusers"
    dtype = str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")
    return [f"model={group}", f"model.name={model.name}", "logger=none", *(
        [f"model.dtype={dtype}"] if group == "pipeline" and dtype in DTYPES else []
    )]


def _sizes(model: DiffusionModel, n: int | None) -> list[str]:
    """Return how many trajectories are drawn, and how many calls are recorded of each."""
    if not isinstance(model, PipelineModel):
        return [f"calibration.n_samples={STATES if n is None else n}"]
    steps, prompts = len(model.time_grid()), max(1, len(model.requests))
    wanted = min(prompts, TRAJECTORIES) * steps if n is None else n
    each = min(steps, -(-wanted // prompts))
    images = -(-wanted // each)
    return [
        f"calibration.n_samples={images}", f"calibration.steps_per_sample={each}",
        f"calibration.batch_size={min(images, 8)}",
    ]


def sample(
    model: DiffusionModel | QuantizedModel, n: int, seed: int = 0, *,
    steps: int | None = None, spacing: str | None = None, eta: float | None = None, guidance_scale: float | None = None,
    denoiser: nn.Module | None = None, batch_size: int = 8, device: torch.device | str = "cpu", progress: bool = False,
) -> np.ndarray:
    """Draw images 0..n-1 of `seed`, uint8 [n, H, W, C]; the published sampler where nothing else is said.

    Image i depends on (seed, i) and the sampler alone: batches are padded to `batch_size`. Class-conditional models
    draw every class equally often (`DiffusionModel.labels`).

    Args:
        model: see `load_model`; or `load_quantized`, whose sampler settings are those that it was made for.
        steps, spacing, eta: see `DiffusionModel.time_grid`.
        guidance_scale: classifier-free guidance, 1 = none.
        denoiser: a quantized network in place of the model's own.
        batch_size: images per network evaluation (twice as many with guidance).
        device: where to compute; the model is moved there.
        progress: show a progress bar.

    Raises:
        ConfigError: a sampler setting does not fit the model, or is given for a saved quantized one.
        DataError: the images hold NaN or infinity (CheckpointError, ConfigError: the network gives them at once).
    """
    how = {"batch_size": batch_size, "device": device, "progress": progress}
    if isinstance(model, QuantizedModel):
        given = {"steps": steps, "spacing": spacing, "eta": eta, "guidance_scale": guidance_scale, "denoiser": denoiser}
        if refused := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{refused[0]}: a saved quantized model is sampled as it was made; for other settings, without its "
                "schedule and correction, call sample(quantized.model, n, denoiser=quantized.network, ...)"
            )
        return model.sample(n, seed, **how)
    grid = model.time_grid(steps, spacing, eta=eta)
    scale = model.sampler.guidance_scale if guidance_scale is None else guidance_scale
    try:
        network = model.in_parts(model.denoiser) if denoiser is None else denoiser
        return draw(model, model.guided(network, scale), grid, n, seed, **how)
    except DataError:
        if denoiser is None:
            check_network(model, grid, seed, device)  # says more, where the network alone is the reason
        raise
