"""The stage that reconstructs a quantized network block by block, and what a run leaves of it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.errors import DataError
from ptq_exp.experiment.ranges import batches_of_times, time_layers
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.transforms import transformed
from ptq_exp.experiment.twin import Twin
from ptq_exp.lightning import reconstruct_network
from ptq_exp.quantization import ActivationQuantizer, WeightQuantizer, select_row
from ptq_exp.reconstruction import (
    Annealing,
    Block,
    BlockReport,
    Reconstruction,
    Settings,
    TimeBlock,
    find_blocks,
    find_time_blocks,
    summary,
)
from ptq_exp.settings.schema import ReconstructionConfig
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.plain_json import write_json

log = logging.getLogger("ptq_exp")

_REPORTS = "reports"


def reconstruct(setup: Setup, twin: Twin, calibration_set: CalibrationSet) -> Twin:
    """Learn (or reuse) roundings and step sizes of the twin's network, where `reconstruction` asks for that.

    With candidate widths of activations the network is at the widest: its weights are those of all widths. With ranges
    for bins of sampling steps each calibration sample uses those of its own step. The layers that depend on the time
    alone are reconstructed first, on all times there are, where `quantization.time_layers` asks for that.

    Raises:
        ConfigError: step sizes are to be learned, but activations have several widths.
        QuantizationError: the network has no such blocks; the message says what to choose.
    """
    if not setup.config.reconstruction.active:
        return twin
    spec = setup.quantization_spec()
    folder = setup.working_folder("reconstruction", spec)
    if len(setup.activation_widths) > 1:
        select_row(twin.network, len(setup.activation_widths) - 1)
    reports: list[BlockReport] = []

    def make() -> dict[str, np.ndarray]:
        reports.extend(_reconstructed(setup, twin, calibration_set, folder))
        return _arrays(twin.network) | {_REPORTS: np.array(json.dumps([report.to_dict() for report in reports]))}

    arrays, reused = setup.cache.get_or_make(
        "reconstruction", spec, make=make, save=lambda arrays, path: write_npz(path, **arrays), load=npz_arrays
    )
    shutil.rmtree(folder, ignore_errors=True)
    if reused:
        reports = [BlockReport.from_dict(plain) for plain in json.loads(str(arrays[_REPORTS]))]
        _restore(twin.network, {name: array for name, array in arrays.items() if name != _REPORTS})
    said = summary(reports)
    log.info(
        "reconstruction %s: %s, %d blocks, %d of them better than nearest rounding; relative error %.4f -> %.4f on "
        "held-out samples", setup.config.reconstruction.name, "reused from the cache" if reused else "computed",
        said["blocks"], said["kept"], said["error_before"], said["error"],
    )  # fmt: skip
    return replace(twin, reconstruction=reports)


def reconstruction_account(twin: Twin, folder: Path) -> dict[str, Any]:
    """What results.json says of the reconstruction, if there was one; all blocks go to reconstruction.json."""
    if twin.reconstruction is None:
        return {}
    said = summary(twin.reconstruction)
    write_json(
        folder / "reconstruction.json",
        {"summary": said, "blocks": [report.to_dict() for report in twin.reconstruction]},
    )
    return {"reconstruction": said}


def calibration_seconds(setup: Setup, twin: Twin) -> dict[str, float | None]:
    """Wall seconds of calibration when it was computed: {part: seconds} and their "total"; None where unknown.

    Parts: the calibration set, the ranges (with transforms) and the roundings. What runs share counts in each of them,
    and a part that was continued after a kill as long as its last process took.
    """
    seconds = setup.cache.seconds
    parts = {
        "calibration_set": seconds["calibration"],
        "ranges": seconds["ranges"] + seconds["transform"],
        "reconstruction": sum(report.seconds for report in twin.reconstruction or ()),
    }
    parts["total"] = sum(parts.values())
    return {part: None if math.isnan(value) else round(value, 2) for part, value in parts.items()}


def settings_of(config: ReconstructionConfig) -> Settings:
    """The settings of every block."""
    return Settings(
        Annealing(config.iterations, config.weight, config.warmup, config.b_start, config.b_end),
        batch_size=config.batch_size, lr=config.lr, step_lr=config.step_lr, power=config.power,
        input_prob=config.input_prob, drop_prob=config.drop_prob, inner_weight=config.inner_weight,
    )  # fmt: skip


def _reconstructed(setup: Setup, twin: Twin, calibration_set: CalibrationSet, folder: Path) -> list[BlockReport]:
    """Reconstruct the twin's network in place; a killed run with the same settings is continued."""
    config, network = setup.config, twin.network
    reference = transformed(setup, twin.transforms)  # whose weights were rounded
    reference.to(setup.device)
    example = tuple(part.to(setup.device) for part in setup.model.example_inputs())
    blocks = blocks_of(setup, network, reference, example)
    reconstruction = Reconstruction(
        network, reference, blocks, calibration_set, settings_of(config.reconstruction), seed=config.seed,
        batch_size=config.calibration.batch_size,
        cache_bytes=1e9 * config.reconstruction.cache_gb, folder=folder / "rows",
        row_of_step=setup.time_bins if setup.n_bins > 1 else None,
    )  # fmt: skip
    trainer = config.trainer
    return reconstruct_network(
        reconstruction, folder / "blocks.ckpt", accelerator=trainer.accelerator, progress_bar=trainer.progress_bar
    )


def blocks_of(setup: Setup, network: nn.Module, reference: nn.Module, example: tuple[torch.Tensor, ...]) -> list[Block]:
    """The blocks of the quantized `network` in the order of their reconstruction, layers of the time alone first.

    Raises:
        QuantizationError: the network has no such blocks; the message says what to choose.
    """
    config = setup.config
    patterns = setup.model.blocks if config.reconstruction.granularity == "block" else ()
    of_time = time_layers(setup, reference) if config.quantization.time_layers == "all_steps" else []
    return [*_time_blocks(setup, network, reference, of_time), *find_blocks(network, patterns, example, of_time)]


def _time_blocks(setup: Setup, network: nn.Module, reference: nn.Module, layers: list[str]) -> list[TimeBlock]:
    """The `layers` that depend on the time alone: one block, or one each with reconstruction.granularity=layer."""
    if not layers:
        return []
    batches = [(row, batch) for row in range(setup.n_bins) for batch in batches_of_times(setup, row)]
    rows = torch.cat([torch.full((len(batch[1]),), row) for row, batch in batches]) if setup.n_bins > 1 else None
    joint = setup.config.reconstruction.granularity == "block"
    blocks = find_time_blocks(network, reference, layers, [batch for _, batch in batches], rows, joint=joint)
    log.info(
        "quantization.time_layers: %d layers depend on the time alone and are reconstructed on all %d times, %s",
        len(layers), sum(len(batch[1]) for _, batch in batches), "together" if joint else "each by itself",
    )  # fmt: skip
    return blocks


def _learned(network: nn.Module) -> dict[str, torch.Tensor]:
    """What a reconstruction changes: the weights that are quantized, and the step sizes of activations."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, ActivationQuantizer):
            found[f"{name}.scale"] = module.scale
    return found


def _arrays(network: nn.Module) -> dict[str, np.ndarray]:
    # numpy knows no bfloat16; float32 holds all its values
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in _learned(network).items()}


@torch.no_grad()
def _restore(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Give `network`, calibrated, what `_arrays` took.

    Raises:
        DataError: the arrays are those of another network; it is left unchanged.
    """
    learned = _learned(network)
    wrong = sorted(set(learned) ^ set(arrays)) or [
        name for name, tensor in learned.items() if arrays[name].shape != tuple(tensor.shape)
    ]
    if wrong:
        raise DataError(f"the stored reconstruction belongs to another network: {', '.join(wrong[:3])} do not fit")
    for name, tensor in learned.items():
        tensor.copy_(torch.from_numpy(np.array(arrays[name])))
