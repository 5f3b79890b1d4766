"""The stages of an experiment: each takes what it needs, reuses shared artefacts, and says what it did."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

import ptq_exp
from ptq_exp.calibration import CalibrationSet, labelled, positions
from ptq_exp.errors import DataError
from ptq_exp.evaluation import (
    FeatureStatistics,
    GaussianStatistics,
    content_digest,
    extract_features,
    load_reference,
    load_statistics,
)
from ptq_exp.experiment.noise import twin_spec
from ptq_exp.experiment.policy import policy
from ptq_exp.experiment.ranges import calibrate
from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.transforms import transform_
from ptq_exp.experiment.twin import Twin
from ptq_exp.lightning import (
    CalibrationModule,
    EvaluationModule,
    collect_calibration_set,
    draw_images,
)
from ptq_exp.quantization import quantize_
from ptq_exp.quantization.stored import range_arrays, restore_ranges_
from ptq_exp.results.record import read_samples, write_samples
from ptq_exp.settings.compose import build
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.pieces import Parts, slices

log = logging.getLogger("ptq_exp")


Reference = FeatureStatistics | GaussianStatistics
FEATURE_BATCH = 64


def _said(what: str, value_and_reused: tuple[Any, bool], detail: Callable[[Any], str] = lambda value: "") -> Any:
    """Say whether an artefact was reused or computed, and return it."""
    value, reused = value_and_reused
    log.info("%s: %s%s", what, "reused from the cache" if reused else "computed", detail(value))
    return value


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Errors about the data inside name the setting that says where they are."""
    try:
        yield
    except DataError as error:
        if "evaluation." in str(error):  # says one already
            raise
        raise DataError(f"{setting}: {error}") from error


def make_calibration_set(setup: Setup, previous: Twin | None = None, calibration_round: int = 1) -> CalibrationSet:
    """Collect (or reuse) the calibration set that `calibration` describes.

    From the second round on it holds the states of `previous`, the quantized twin of the round before.
    """
    config, spec = setup.config.calibration, setup.calibration_spec(calibration_round)
    folder = setup.working_folder("calibration", spec)

    def make() -> CalibrationSet:
        distribution = build(config.distribution, "calibration.distribution")
        drawn = positions(distribution, config.n_samples, len(setup.grid), setup.config.seed)
        states = labelled(drawn, setup.grid, config.labels)
        module = CalibrationModule(
            setup.model, setup.grid, config.source, seed=setup.config.seed, images=setup.images,
            denoiser=setup.guided(setup.model.denoiser) if previous is None else previous.guided(setup),
        )  # fmt: skip
        null_label = None if setup.guidance_scale == 1 else setup.model.null_label
        joined = folder / "joined.npz"
        collect_calibration_set(
            module, setup.trainer("calibration set"), states, config.batch_size, folder, joined, null_label
        )
        return CalibrationSet.load(joined)

    found = setup.cache.get_or_make(
        "calibration", spec, make=make, save=CalibrationSet.save, load=CalibrationSet.load
    )
    shutil.rmtree(folder, ignore_errors=True)
    which = "" if previous is None else f" of the quantized model, round {calibration_round}"
    return _said(
        f"calibration set {config.name}{which}", found,
        lambda s: f", {len(s)} states, {int(s.evaluations.sum())} network evaluations",
    )  # fmt: skip


def quantize_model(setup: Setup, calibration_set: CalibrationSet, calibration_round: int = 1) -> Twin:
    """A quantized twin of the model's denoiser, calibrated (or with the ranges of an earlier run), and its account.

    The twin's weights hold their quantized values: sampling does not quantize them again at every step.
    """
    quantized = setup.model.twin().to(setup.device)
    example = tuple(part.to(setup.device) for part in setup.model.example_inputs())
    rules = policy(setup, quantized, example)
    transforms = transform_(setup, quantized, calibration_set, calibration_round, rules)
    report = quantize_(quantized, rules, example)
    twin = Twin(quantized, report, rules=tuple(rules), transforms=transforms)

    def make() -> dict[str, np.ndarray]:
        calibrate(setup, twin, calibration_set)
        return range_arrays(quantized)

    arrays, reused = setup.cache.get_or_make(
        "ranges", setup.ranges_spec(calibration_round), make=make, load=npz_arrays,
        save=lambda arrays, path: write_npz(path, **arrays),
    )
    if reused:
        restore_ranges_(quantized, arrays)
    _said("ranges", (arrays, reused))
    return twin


def draw(setup: Setup, denoiser: nn.Module, title: str, folder: Path, path: Path, **noise_in_eps: Any) -> np.ndarray:
    """Images uint8 [N, H, W, C] of samples 0..N-1 drawn with `denoiser` into the file `path`, memory-mapped.

    `denoiser` is guided already. Batches already in `folder` are not drawn again. `noise_in_eps`: see
    `EvaluationModule`.
    """
    evaluation = setup.config.evaluation
    module = EvaluationModule(setup.model, denoiser, setup.grid, seed=setup.config.seed, **noise_in_eps)
    draw_images(module, setup.trainer(title), evaluation.n_samples, evaluation.batch_size, folder, path)
    return read_samples(path)[0]


def full_precision_images(setup: Setup) -> np.ndarray:
    """Draw (or reuse) the images of the full-precision twin."""
    spec = setup.images_spec()
    folder = setup.working_folder("images", spec)
    found = setup.cache.get_or_make(
        "images", spec, save=lambda images, path: write_samples(path, images), load=lambda path: read_samples(path)[0],
        make=lambda: draw(setup, setup.guided(setup.model.denoiser), "FP32 images", folder, folder / "joined.npz"),
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    return _said("FP32 images", found, lambda images: f", {len(images)}")


def quantized_images(setup: Setup, twin: Twin, path: Path) -> np.ndarray:
    """Draw the images of the quantized model into `path`; a killed run with the same settings is continued."""
    config = setup.config
    with setup.working_in("quantized images", setup.images_spec() | twin_spec(setup, twin)) as folder:
        return draw(
            setup, twin.corrected(setup), f"{config.bits.name.upper()} images", folder, path, **twin.noise_in_eps(setup)
        )


def image_features(setup: Setup, images: np.ndarray, title: str, spec: dict[str, Any]) -> FeatureStatistics:
    """Features of `images`, batch by batch on disk: a killed run with the same `spec` goes on where it stopped."""
    spec = spec | {"extractor": setup.extractor.name}
    batches = {rows.start: rows for rows in slices(len(images), FEATURE_BATCH)}
    with setup.working_in("features", spec) as folder, setup.progress(len(images), title) as bar:
        parts = Parts(folder, list(batches), len(images), ("pooled", "spatial", "probabilities"))
        joined = folder / "joined.npz"
        while not parts.join(joined, name=np.array(title), extractor=np.array(setup.extractor.name)):
            missing = parts.missing()
            bar.n = len(images) - sum(len(range(*batches[start].indices(len(images)))) for start in missing)
            for start in missing:
                found = extract_features(setup.extractor, images[batches[start]])
                parts.write(
                    start, pooled=found.pooled, spatial=found.spatial, probabilities=found.probabilities
                )
                bar.update(len(found))
        return FeatureStatistics.load(joined)


def full_precision_features(setup: Setup, images: np.ndarray) -> FeatureStatistics:
    """Features of the full-precision images, computed or reused."""
    spec = setup.images_spec() | {"extractor": setup.extractor.name}
    found = setup.cache.get_or_make(
        "features", spec, save=lambda value, path: value.save(path), load=FeatureStatistics.load,
        make=lambda: image_features(setup, images, "FP32 features", setup.images_spec()),
    )  # fmt: skip
    return _said("FP32 features", found)


def reference_features(setup: Setup) -> Reference:
    """What the scores refer to, computed or reused: features of real images, or stored means and covariances."""
    node, extractor = setup.config.evaluation.reference, setup.extractor
    spec = {"version": ptq_exp.__version__, "reference": node, "extractor": extractor.name}

    def make() -> Reference:
        with _naming("evaluation.reference"):
            if isinstance(node, str):
                with tqdm(desc="reference", unit=" images", disable=not setup.config.trainer.progress_bar) as bar:
                    return load_reference(node, extractor, progress=bar.update)
            images = build(node, "evaluation.reference")
            name = f"{setup.config.evaluation.name}, {len(images)} real"
            return extract_features(extractor, images, name=name, batch_size=FEATURE_BATCH)

    if isinstance(node, str):
        with _naming("evaluation.reference"):
            spec["content"] = content_digest(node)
    found = setup.cache.get_or_make(
        "reference", spec, make=make, save=lambda value, path: value.save(path), load=load_statistics
    )
    return _said("reference features", found, lambda reference: f", {reference.name}")
