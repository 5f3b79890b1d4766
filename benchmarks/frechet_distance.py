"""Fréchet distance at 2048 dimensions: this package against the `scipy.linalg.sqrtm` route, in one run.

    python benchmarks/frechet_distance.py [--dimension 2048] [--samples 5000]

CPU seconds of the process, so that other load on the machine counts for little; one thread unless
OMP_NUM_THREADS says otherwise. From statistics, both start with the same means and covariances; from
features, the time of the covariances is part of the sqrtm route. With fewer rows than columns the covariances
are singular, and `frechet_distance_from_features` never forms them.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy.linalg

from ptq_exp.evaluation import frechet_distance, frechet_distance_from_features


def sqrtm_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The formula as it is written, with the matrix square root of the product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a singular product is part of the comparison
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def features(seed: int, rows: int, dimension: int, mixing: np.ndarray) -> np.ndarray:
    """Correlated, non-negative features, as a network pools them."""
    normal = np.random.default_rng(seed).standard_normal((rows, dimension))
    return np.maximum(normal @ mixing + 0.3, 0).astype(np.float32)


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64)


def timed(name: str, function: Callable[[], float], baseline: tuple[float, float] | None = None):
    """(value, CPU seconds), printed; with a baseline also the speed and the difference relative to it."""
    started = time.process_time()
    value = function()
    seconds = time.process_time() - started
    text = f"  {name:<31} {seconds:7.2f} s   {value:.8f}"
    if baseline is not None:
        difference = abs(value / baseline[0] - 1)
        text += f"   {baseline[1] / seconds:6.1f}x as fast, relative difference {difference:.1e}"
    print(text, flush=True)
    return value, seconds


def compare(rows: int, dimension: int, mixing: np.ndarray) -> None:
    """Both routes on two sets of `rows` features, from their statistics and from the features."""
    a, b = features(1, rows, dimension, mixing), features(2, rows, dimension, mixing * 1.05)
    both = (*statistics(a), *statistics(b))
    print(f"{rows} against {rows} rows of {dimension} features, from statistics")
    baseline = timed("sqrtm", lambda: sqrtm_distance(*both))
    timed("frechet_distance", lambda: frechet_distance(*both), baseline)
    print(f"{rows} against {rows} rows of {dimension} features, from features")
    baseline = timed("np.cov and sqrtm", lambda: sqrtm_distance(*statistics(a), *statistics(b)))
    timed("frechet_distance_from_features", lambda: frechet_distance_from_features(a, b), baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=5000)
    arguments = parser.parse_args()
    dimension = arguments.dimension
    mixing = np.random.default_rng(0).standard_normal((dimension, dimension)) / np.sqrt(dimension)
    compare(arguments.samples, dimension, mixing)
    compare(dimension // 4, dimension, mixing)


if __name__ == "__main__":
    main()
