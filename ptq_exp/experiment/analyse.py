"""The stage that analyses a model: activation ranges per sampling step, and the error that each layer alone makes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptq_exp.correction import measured_steps
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.keys import Keys, versioned
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, Made, Record, cached
from ptq_exp.lightning import ActivationModule, SensitivityModule, measure, measure_sensitivity
from ptq_exp.quantization import ActivationQuantizer, probe_of, quantized_layers, quantizers
from ptq_exp.reports.html.analysis import FILE
from ptq_exp.settings.schema import AnalysisConfig
from ptq_exp.storage.atomic import write_npz

log = logging.getLogger("ptq_exp")

FRACTIONS = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Quantiles that are recorded: minimum, 1 %, quartiles, 99 %, maximum."""
Arrays = dict[str, np.ndarray]


def analyse(run: Run, settings: AnalysisConfig, keys: Keys, quantized: QuantizedModel) -> Made:
    """Measure what `analysis` asks for: ranges of activations per step and, with sensitivity, the error of each layer.

    Networks are left uncompiled: their layers are switched one by one, which would compile each time.

    Returns:
        Arrays `sites` [O] (activation quantizers), `steps` [S], `fractions` [Q] and `activations` float32 [O, S, Q],
        the quantiles on full-precision trajectories; with sensitivity also `layers` [L], `sensitivity_steps` [T] and
        `sensitivity` float64 [L, T], the relative eps error with that layer alone quantized.

    Raises:
        ConfigError: `analysis.layers` names no quantized layer.
    """
    layers = chosen_layers(quantized_layers(quantized.network), settings.layers)
    probe = probe_of(quantized.network, run.model.denoiser)
    denoiser = replace(quantized, network=probe, statistics=None, compile=False, cuda_graph=False).denoiser
    arrays = _activations(run, settings, keys.sampling(), denoiser, probe, layers)
    found: dict[str, Any] = {"file": FILE, "sites": len(arrays["sites"]), "steps": arrays["steps"].tolist()}
    if settings.sensitivity:
        key = keys.estimates(quantized.schedule, quantized.statistics is not None)
        arrays |= _sensitivity(run, settings, key, (denoiser, probe, quantized.network), layers)
        worst = np.argsort(-arrays["sensitivity"].mean(1), kind="stable")[:10]
        found["most_sensitive"] = {layers[i]: float(arrays["sensitivity"][i].mean()) for i in worst}
        log.info("most sensitive: %s", ", ".join(f"{k} {v:.2%}" for k, v in list(found["most_sensitive"].items())[:3]))
    return Made(arrays, Record({"analysis": found}, {FILE: lambda path: write_npz(path, **arrays)}))


def chosen_layers(layers: list[str], patterns: list[str]) -> list[str]:
    """Those of `layers` that one of the globs `patterns` matches, in their order.

    Raises:
        ConfigError: a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(
                f"analysis.layers: {pattern!r} matches no quantized layer; there are {', '.join(layers[:3])}, ..."
            )
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]


def quantiles(low: np.ndarray, high: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Quantiles `FRACTIONS` over samples and values, float32 [O, S, Q].

    Args:
        low, high: exact extremes of each sample, [N, O, S]: those of the result.
        values: drawn from each sample, [N, O, S, K], NaN where there were fewer.
    """
    found = np.empty((*low.shape[1:], len(FRACTIONS)), np.float32)
    for site in range(found.shape[0]):  # one at a time: `values` may be mapped from a large file
        rows = np.array(values[:, site])
        for step in range(found.shape[1]):
            drawn = rows[:, step][~np.isnan(rows[:, step])]
            found[site, step] = np.quantile(drawn, FRACTIONS) if drawn.size else np.nan
    found[..., 0], found[..., -1] = low.min(0), high.max(0)
    return found


def _activations(
    run: Run, settings: AnalysisConfig, key: Key, denoiser: nn.Module, probe: nn.Module, layers: list[str]
) -> Arrays:
    wanted = set(layers)
    sites = [
        name for name, quantizer in quantizers(probe)
        if isinstance(quantizer, ActivationQuantizer) and name.rpartition(".")[0] in wanted
    ]
    steps = measured_steps(len(run.grid), settings.steps)
    module = ActivationModule(
        run.model, denoiser, probe, run.grid, sites, steps, seed=run.seed, values=settings.values,
        copies=1 if run.guidance_scale == 1 else 2,
    )
    n, batch_size = settings.n_samples, min(settings.batch_size, settings.n_samples)
    key = {**key, "sites": sites, "steps": steps, "samples": [n, batch_size, settings.values]}

    def make(folder: Path) -> Arrays:
        return {"activations": quantiles(**measure(module, run.trainer("activation ranges"), n, batch_size, folder))}

    found = _measured(run, "activations", key, make, f"{len(sites)} sites in {len(steps)} steps of {n} trajectories")
    return {"sites": np.array(sites), "steps": np.array(steps), "fractions": np.array(FRACTIONS)} | found


def _sensitivity(
    run: Run, settings: AnalysisConfig, key: Key, networks: tuple[nn.Module, nn.Module, nn.Module], layers: list[str]
) -> Arrays:
    """Measure the error of each layer alone; `networks`: the probe as sampled, the probe, the quantized network."""
    steps = measured_steps(len(run.grid), settings.sensitivity_steps)
    n = settings.sensitivity_samples
    alone = [[name] for name in layers]
    module = SensitivityModule(
        run.model, *networks, run.grid, alone, steps, range(n), seed=run.seed, batch_size=settings.batch_size
    )
    key = {**key, "layers": layers, "steps": steps, "samples": [n, settings.batch_size]}

    def make(folder: Path) -> Arrays:
        return {"sensitivity": measure_sensitivity(module, run.trainer("sensitivity of layers"), folder)}

    what = f"{len(layers)} layers in {len(steps)} steps of {n} trajectories"
    found = _measured(run, "sensitivity", key, make, what)
    return {"layers": np.array(layers), "sensitivity_steps": np.array(steps)} | found


def _measured(run: Run, kind: str, key: Key, make: Callable[[Path], Arrays], what: str) -> Arrays:
    arrays = cached(run.cache, kind, versioned(kind, key), make, kind, detail=lambda _: f", {what}")
    return {key: np.array(value) for key, value in arrays.items()}
