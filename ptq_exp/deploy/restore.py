"""The quantized network of a saved model, put back into a model of its structure."""

from __future__ import annotations

import torch

from ptq_exp.calibration import time_bins
from ptq_exp.deploy.artifact import Artifact
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.quantization.offload import copy_of, folder_of, outermost, stream_weights_
from ptq_exp.quantization.save import load_quantized_, rule_from_dict

_RECIPE = ("ptq_exp", "model", "evaluations", "settings")


def restored(
    artifact: Artifact, model: DiffusionModel, grid: TimeGrid, guidance_scale: float, device: torch.device, *,
    full_precision: bool = True, compiled: bool = False,
) -> QuantizedModel:
    """Restore the quantized model in the files of `artifact`, to be sampled on `grid`.

    Args:
        full_precision: whether `model` has its weights; without them its denoiser becomes the quantized network.
        compiled: compile the network.

    Raises:
        DataError: the files do not fit the model, or are not those any more that `artifact` was opened from.
    """
    network = (copy_of(model.denoiser) if full_precision else model.denoiser).to(device)
    if folder_of(network) is not None:
        stream_weights_(network, outermost(network, model.blocks))
    example = model.example_inputs().to(device)
    transforms = artifact.transforms()
    for done in transforms:
        done.install_(network)
    report = load_quantized_(network, artifact.folder, example, artifact.digest)
    schedule, widths = artifact.schedule(), tuple(artifact.description["activation_widths"])
    if schedule is not None and len(widths) > 1:
        report = report.mixed(schedule.shares(list(widths)))
    bins = time_bins(
        grid, artifact.setting("quantization.temporal", str, "static"),
        artifact.setting("quantization.temporal_bins", int, 1),
    )
    description = artifact.description
    recipe = {key: description[key] for key in _RECIPE if key in description}
    pipeline = {} if description.get("pipeline") is None else {"pipeline": artifact.arguments("pipeline")}
    return QuantizedModel(
        model, network, report, grid, guidance_scale,
        rules=tuple(rule_from_dict(rule) for rule in description["rules"]), widths=widths,
        time_bins=bins if int(bins.max()) else None, schedule=schedule, statistics=artifact.statistics(),
        variance=artifact.setting("correction.variance", bool, False),
        convention=artifact.setting("correction.convention", str, "paper"),
        transforms=transforms, full_precision=full_precision, compile=compiled,
        recipe=recipe | pipeline,
    )
