"""The stage that reconstructs a quantized network block by block."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.experiment.blockwise_reconstruct import BlockwiseReconstruction, restore_arrays_
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.ranges import batches_of_times, time_layers
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, Made, Record, cached
from ptq_exp.experiment.transforms import transformed
from ptq_exp.lightning import reconstruct_network
from ptq_exp.quantization import select_row
from ptq_exp.reconstruction import (
    Annealing,
    Block,
    BlockReport,
    GPTQSettings,
    Reconstruction,
    Settings,
    TimeBlock,
    find_blocks,
    find_time_blocks,
    learned_tensors,
    put_learned_,
    summary,
)
from ptq_exp.settings.schema import ReconstructionConfig
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.plain_json import write_json

log = logging.getLogger("ptq_exp")

_REPORTS = "reports"


def reconstruct(
    run: Run, plan: Plan, config: ReconstructionConfig, key: Key, quantized: QuantizedModel,
    calibration_set: CalibrationSet,
) -> Made:
    """Find (or reuse) roundings and step sizes of the quantized network, where `config` asks for that; in place.

    With candidate widths of activations the network is at the widest: its weights are those of all widths. With ranges
    for bins of sampling steps each calibration sample uses those of its own step. The layers that depend on the time
    alone are reconstructed first, on all times there are, where `quantization.time_layers` asks for that.

    Raises:
        ConfigError: step sizes are to be learned, but activations have several widths.
        QuantizationError: the network has no such blocks; the message says what to choose.
    """
    if not config.active:
        return Made(quantized, Record({"calibration_seconds": calibration_seconds(run.cache, [])}))
    network = quantized.network
    if len(plan.widths) > 1:
        select_row(network, len(plan.widths) - 1)

    def make(folder: Path) -> Mapping[str, np.ndarray]:
        reconstruction = _reconstruction(run, plan, config, quantized, calibration_set, folder)
        if run.blockwise:
            return BlockwiseReconstruction(run, reconstruction, folder).reconstruct()
        trainer = run.trainer_settings
        reports = reconstruct_network(
            reconstruction, folder / "blocks.ckpt", accelerator=trainer["accelerator"],
            progress_bar=trainer["progress_bar"],
        )
        return _arrays(network) | {_REPORTS: np.array(json.dumps([report.to_dict() for report in reports]))}

    kind, restore = ("reconstruction_packed", restore_arrays_) if run.blockwise else ("reconstruction", _restore)
    arrays = cached(
        run.cache, kind, key, make, f"reconstruction {config.name}",
        when_reused=lambda arrays: restore(network, {k: v for k, v in arrays.items() if k != _REPORTS}),
    )
    reports = [BlockReport.from_dict(plain) for plain in json.loads(str(arrays[_REPORTS]))]
    found = summary(reports)
    log.info(
        "%d blocks, %d of them better than nearest rounding; relative error %.4f -> %.4f on held-out samples",
        found["blocks"], found["kept"], found["error_before"], found["error"],
    )
    _log_left_alone(reports)
    numbers = {"calibration_seconds": calibration_seconds(run.cache, reports), "reconstruction": found}
    plain = {"summary": found, "blocks": [report.to_dict() for report in reports]}
    return Made(quantized, Record(numbers, {"reconstruction.json": lambda path: write_json(path, plain)}))


def _log_left_alone(reports: list[BlockReport]) -> None:
    """Log which layers kept their nearest rounding, and why."""
    reasons: dict[str, list[str]] = {}
    for report in reports:
        for detail in report.details:
            if detail.note:
                reasons.setdefault(detail.note, []).append(f"{report.name}.{detail.layer}".rstrip("."))
    for note, layers in reasons.items():
        shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
        log.info("nearest rounding stays: %d layers (%s): %s", len(layers), shown, note)


def calibration_seconds(cache: ArtifactCache, reports: list[BlockReport]) -> dict[str, float | None]:
    """Wall seconds of calibration when it was computed: {part: seconds} and their "total"; None where unknown.

    Parts: the calibration set, the ranges (with transforms) and the roundings. What runs share counts in each of them,
    and a part that was continued after a kill as long as its last process took.
    """
    seconds = cache.seconds
    parts = {
        "calibration_set": seconds["calibration"],
        "ranges": seconds["ranges"] + seconds["transform"],
        "reconstruction": sum(report.seconds for report in reports),
    }
    parts["total"] = sum(parts.values())
    return {part: None if math.isnan(value) else round(value, 2) for part, value in parts.items()}


def settings_of(config: ReconstructionConfig) -> Settings | GPTQSettings:
    """Return the settings of every block."""
    if config.method == "gptq":
        return GPTQSettings(config.act_order, config.damping, 1e9 * config.hessian_gb)
    return Settings(
        Annealing(config.iterations, config.weight, config.warmup, config.b_start, config.b_end),
        batch_size=config.batch_size, lr=config.lr, step_lr=config.step_lr, power=config.power,
        input_prob=config.input_prob, drop_prob=config.drop_prob, inner_weight=config.inner_weight,
        half=config.precision == "bf16",
    )


def _reconstruction(
    run: Run, plan: Plan, config: ReconstructionConfig, quantized: QuantizedModel, calibration_set: CalibrationSet,
    folder: Path,
) -> Reconstruction:
    """Return the reconstruction of the network in place."""
    network = quantized.network
    reference = transformed(run, quantized.transforms)  # whose weights were rounded
    reference.to(run.device)
    blocks = blocks_of(run, plan, config, network, reference)
    return Reconstruction(
        network, reference, blocks, calibration_set, settings_of(config), seed=run.seed, batch_size=plan.batch_size,
        cache_bytes=1e9 * config.cache_gb, folder=folder / "rows",
        row_of_step=plan.time_bins if plan.n_bins > 1 else None,
    )


def blocks_of(
    run: Run, plan: Plan, config: ReconstructionConfig, network: nn.Module, reference: nn.Module
) -> list[Block]:
    """Return the blocks of the quantized `network` in the order of reconstruction, layers of the time alone first.

    Raises:
        QuantizationError: the network has no such blocks; the message says what to choose.
    """
    patterns = run.model.blocks if config.granularity == "block" else ()
    of_time = time_layers(run, reference) if plan.quantization.time_layers == "all_steps" else []
    times = _time_blocks(run, plan, network, reference, of_time, joint=config.granularity == "block")
    return [*times, *find_blocks(network, patterns, run.example(), of_time)]


def _time_blocks(
    run: Run, plan: Plan, network: nn.Module, reference: nn.Module, layers: list[str], *, joint: bool
) -> list[TimeBlock]:
    """Return the `layers` that depend on the time alone: one block if `joint`, else one each."""
    if not layers:
        return []
    batches = [(row, batch) for row in range(plan.n_bins) for batch in batches_of_times(run, plan, row)]
    rows = torch.cat([torch.full((len(batch[1]),), row) for row, batch in batches]) if plan.n_bins > 1 else None
    blocks = find_time_blocks(network, reference, layers, [batch for _, batch in batches], rows, joint=joint)
    log.info(
        "quantization.time_layers: %d layers depend on the time alone and are reconstructed on all %d times, %s",
        len(layers), sum(len(batch[1]) for _, batch in batches), "together" if joint else "each by itself",
    )
    return blocks


def _arrays(network: nn.Module) -> dict[str, np.ndarray]:
    def plain(tensor: torch.Tensor) -> np.ndarray:
        # numpy knows no bfloat16; float32 holds all its values
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()

    return {name: plain(tensor) for name, tensor in learned_tensors(network).items()}


def _restore(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    put_learned_(network, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
