"""The stages that compute features of images: of those that are drawn, and of what their scores refer to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ptq_exp.errors import naming
from ptq_exp.evaluation import (
    FeatureStatistics,
    GaussianStatistics,
    content_digest,
    extract_features,
    load_reference,
    load_statistics,
)
from ptq_exp.experiment.keys import joined, versioned
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stage import Key, cached, resumable
from ptq_exp.lightning import Bar
from ptq_exp.settings.build import build
from ptq_exp.settings.schema import EvaluationConfig
from ptq_exp.storage.pieces import JOINED, Parts, slices

Reference = FeatureStatistics | GaussianStatistics
FEATURE_BATCH = 64


def features_key(run: Run, key: Key) -> Key:
    """Return what identifies the features of the images whose key is `key`."""
    return versioned("features", joined(key, {"extractor": run.extractor.name}))


def reference_key(run: Run, config: EvaluationConfig) -> Key:
    """Return what identifies the features that scores refer to, but for the content of files."""
    return versioned("reference", {"reference": config.reference, "extractor": run.extractor.name})


def image_features(run: Run, images: np.ndarray, title: str, key: Key) -> FeatureStatistics:
    """Compute features of `images`, batch by batch on disk: a killed run with the same `key` is continued."""
    batches = {rows.start: rows for rows in slices(len(images), FEATURE_BATCH)}
    with resumable(run.cache, "features", features_key(run, key)) as folder, run.progress(len(images), title) as bar:
        parts = Parts(folder, list(batches), len(images), ("pooled", "spatial", "probabilities"))
        path = folder / JOINED
        while not parts.join(path, name=np.array(title), extractor=np.array(run.extractor.name)):
            missing = parts.missing()
            bar.n = len(images) - sum(len(range(*batches[start].indices(len(images)))) for start in missing)
            for start in missing:
                found = extract_features(run.extractor, images[batches[start]])
                parts.write(start, pooled=found.pooled, spatial=found.spatial, probabilities=found.probabilities)
                bar.update(len(found))
        return FeatureStatistics.load(path)


def full_precision_features(run: Run, images: np.ndarray, key: Key) -> FeatureStatistics:
    """Compute (or reuse) features of the full-precision images, whose key is `key`."""
    return cached(
        run.cache, "features", features_key(run, key),
        lambda folder: image_features(run, images, "FP32 features", key), "FP32 features",
        save=lambda value, path: value.save(path), load=FeatureStatistics.load,
    )


def reference_features(run: Run, config: EvaluationConfig) -> Reference | None:
    """Compute (or reuse) what the scores refer to: features of real images, or stored means and covariances.

    Returns:
        None where images are not scored.
    """
    if run.extractor is None or config.reference is None:
        return None
    node, extractor = config.reference, run.extractor
    of_reference = partial(naming, "evaluation.reference: ", unless="evaluation.")
    key = reference_key(run, config)

    def make(folder: Path) -> Reference:
        with of_reference():
            if isinstance(node, str):
                with Bar(desc="reference", unit=" images", disable=not run.trainer_settings["progress_bar"]) as bar:
                    return load_reference(node, extractor, progress=bar.update)
            images = build(node, "evaluation.reference")
            name = f"{config.name}, {len(images)} real"
            return extract_features(extractor, images, name=name, batch_size=FEATURE_BATCH)

    if isinstance(node, str):
        with of_reference():
            key["content"] = content_digest(node)
    return cached(
        run.cache, "reference", key, make, "reference features", save=lambda value, path: value.save(path),
        load=load_statistics, detail=lambda reference: f", {reference.name}",
    )
