"""The stage that analyses a model: activation ranges per sampling step, and the error that each layer alone makes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptq_exp.correction import measured_steps
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.noise import twin_spec
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.twin import Twin
from ptq_exp.lightning import ActivationModule, SensitivityModule, measure_sensitivity, record_activations
from ptq_exp.quantization import ActivationQuantizer, probe_of, quantized_layers, quantizers
from ptq_exp.reports.html.analysis import FILE
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays

log = logging.getLogger("ptq_exp")

FRACTIONS = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Quantiles that are recorded: minimum, 1 %, quartiles, 99 %, maximum."""
Arrays = dict[str, np.ndarray]


def analyse(setup: Setup, twin: Twin, folder: Path) -> dict[str, Any]:
    """Measure what `analysis` asks for, write it to analysis.npz in `folder`, and return its outline for results.json.

    Arrays: `sites` [O] (activation quantizers), `steps` [S], `fractions` [Q] and `activations` float32 [O, S, Q], the
    quantiles on full-precision trajectories; with sensitivity also `layers` [L], `sensitivity_steps` [T] and
    `sensitivity` float64 [L, T], the relative eps error with that layer alone quantized.

    Raises:
        ConfigError: `analysis.layers` names no quantized layer.
    """
    settings = setup.config.analysis
    layers = chosen_layers(quantized_layers(twin.network), settings.layers)
    setup = _without_compiling(setup)
    probe = probe_of(twin.network, setup.model.denoiser)
    denoiser = replace(twin, network=probe, statistics=None).guided(setup)
    arrays = _activations(setup, denoiser, probe, layers)
    found: dict[str, Any] = {"file": FILE, "sites": len(arrays["sites"]), "steps": arrays["steps"].tolist()}
    if settings.sensitivity:
        arrays |= _sensitivity(setup, twin, denoiser, probe, layers)
        worst = np.argsort(-arrays["sensitivity"].mean(1), kind="stable")[:10]
        found["most_sensitive"] = {layers[i]: float(arrays["sensitivity"][i].mean()) for i in worst}
        log.info("most sensitive: %s", ", ".join(f"{k} {v:.2%}" for k, v in list(found["most_sensitive"].items())[:3]))
    write_npz(folder / FILE, **arrays)
    return found


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


def _activations(setup: Setup, denoiser: nn.Module, probe: nn.Module, layers: list[str]) -> Arrays:
    settings, wanted = setup.config.analysis, set(layers)
    sites = [
        name for name, quantizer in quantizers(probe)
        if isinstance(quantizer, ActivationQuantizer) and name.rpartition(".")[0] in wanted
    ]  # fmt: skip
    steps = measured_steps(len(setup.grid), settings.steps)
    module = ActivationModule(
        setup.model, denoiser, probe, setup.grid, sites, steps, seed=setup.config.seed, values=settings.values,
        copies=1 if setup.guidance_scale == 1 else 2,
    )  # fmt: skip
    n, batch_size = settings.n_samples, min(settings.batch_size, settings.n_samples)
    spec = setup.sampling_spec() | {"sites": sites, "steps": steps, "samples": [n, batch_size, settings.values]}

    def make(folder: Path) -> Arrays:
        path = folder / "joined.npz"
        record_activations(module, setup.trainer("activation ranges"), n, batch_size, folder, path)
        return {"activations": quantiles(**npz_arrays(path))}

    found = _cached(setup, "activations", spec, make, f"{len(sites)} sites in {len(steps)} steps of {n} trajectories")
    return {"sites": np.array(sites), "steps": np.array(steps), "fractions": np.array(FRACTIONS)} | found


def _sensitivity(setup: Setup, twin: Twin, denoiser: nn.Module, probe: nn.Module, layers: list[str]) -> Arrays:
    settings = setup.config.analysis
    steps = measured_steps(len(setup.grid), settings.sensitivity_steps)
    n = settings.sensitivity_samples
    module = SensitivityModule(
        setup.model, denoiser, probe, twin.network, setup.grid, layers, steps, range(n), seed=setup.config.seed,
        batch_size=settings.batch_size,
    )  # fmt: skip
    spec = twin_spec(setup, twin) | {"layers": layers, "steps": steps, "samples": [n, settings.batch_size]}

    def make(folder: Path) -> Arrays:
        measure_sensitivity(module, setup.trainer("sensitivity of layers"), folder, folder / "joined.npz")
        return {"sensitivity": np.array(npz_arrays(folder / "joined.npz")["error"])}

    found = _cached(setup, "sensitivity", spec, make, f"{len(layers)} layers in {len(steps)} steps of {n} trajectories")
    return {"layers": np.array(layers), "sensitivity_steps": np.array(steps)} | found


def _cached(setup: Setup, kind: str, spec: dict[str, Any], make: Callable[[Path], Arrays], what: str) -> Arrays:
    """What `make` finds, working in a folder where a killed run finds its pieces again; reused where it is there."""
    folder = setup.working_folder(kind, spec)
    arrays, reused = setup.cache.get_or_make(
        kind, spec, make=lambda: make(folder), save=lambda arrays, path: write_npz(path, **arrays), load=npz_arrays
    )
    shutil.rmtree(folder, ignore_errors=True)
    log.info("%s: %s, %s", kind, "reused from the cache" if reused else "measured", what)
    return {key: np.array(value) for key, value in arrays.items()}


def _without_compiling(setup: Setup) -> Setup:
    """`setup` that leaves networks uncompiled: their layers are switched one by one, which would compile each time."""
    config = replace(setup.config, model=replace(setup.config.model, compile=False))
    return replace(setup, config=config)
