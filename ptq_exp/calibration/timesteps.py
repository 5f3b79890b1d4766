"""Distributions over time steps: at which noise level each calibration sample is taken.

A distribution draws *time indices* 0..S-1 of an S-step grid, counted from the image (0 = cleanest), as the papers
write t. `TimeGrid` counts positions from the noise; `positions` is the one place where the two meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ptq_exp.errors import ConfigError


class TimeDistribution(Protocol):
    """Draws `n` time indices in 0..n_steps-1 (0 = cleanest), int64 [n], from `rng`."""

    def draw(self, n: int, n_steps: int, rng: np.random.Generator) -> np.ndarray: ...


def _require_std(std: float) -> None:
    if not std > 0:
        raise ConfigError(f"calibration.distribution.std={std}: a share of the time axis greater than 0 is needed")


def _truncate(fractions: np.ndarray, n_steps: int) -> np.ndarray:
    """Fractions of the time axis -> indices: cut towards zero and clamp, as PTQ4DM does."""
    return np.clip(np.trunc(fractions * n_steps), 0, n_steps - 1).astype(np.int64)


@dataclass(frozen=True)
class Normal:
    """t = clamp(trunc(N(mean, std) T)), mean and std as fractions of T (PTQ4DM's published script: 0.4 and 0.4)."""

    mean: float = 0.4
    std: float = 0.4

    def __post_init__(self) -> None:
        _require_std(self.std)

    def draw(self, n: int, n_steps: int, rng: np.random.Generator) -> np.ndarray:
        """See `TimeDistribution`."""
        return _truncate(rng.normal(self.mean, self.std, n), n_steps)


@dataclass(frozen=True)
class SkewNormal:
    """NDTC (PTQ4DM, section 3.3): a skew normal over the time axis whose centre is at or below T / 2.

    `mean` and `std` are those of the distribution before clamping, as fractions of T; `shape` is scipy's skewness
    parameter a (0 = normal; positive = longer tail towards noise).

    Raises:
        ConfigError: std <= 0, or a mean outside [0, 0.5], which would not be NDTC.
    """

    mean: float = 0.4
    std: float = 0.4
    shape: float = 2.0

    def __post_init__(self) -> None:
        _require_std(self.std)
        if not 0 <= self.mean <= 0.5:
            raise ConfigError(
                f"calibration.distribution.mean={self.mean}: NDTC centres at or below half of the time axis, 0..0.5"
            )

    def draw(self, n: int, n_steps: int, rng: np.random.Generator) -> np.ndarray:
        """See `TimeDistribution`."""
        from scipy.stats import skewnorm  # takes a third of a second to load

        delta = self.shape / math.sqrt(1 + self.shape**2)
        scale = self.std / math.sqrt(1 - 2 * delta**2 / math.pi)
        loc = self.mean - scale * delta * math.sqrt(2 / math.pi)
        return _truncate(skewnorm(self.shape, loc, scale).rvs(n, random_state=rng), n_steps)


@dataclass(frozen=True)
class Uniform:
    """Every time index equally often (counts differ by at most one), in shuffled order (DI2N)."""

    def draw(self, n: int, n_steps: int, rng: np.random.Generator) -> np.ndarray:
        """See `TimeDistribution`."""
        whole = np.tile(np.arange(n_steps), n // n_steps)
        rest = rng.choice(n_steps, n % n_steps, replace=False)
        return rng.permutation(np.concatenate([whole, rest])).astype(np.int64)


@dataclass(frozen=True)
class Constant:
    """One time index for all samples ("naive" calibration).

    `step`: `first`, `last`, `middle`, or a position of the grid as sampling runs (0 = first, the noisiest step).

    Raises:
        ConfigError: `step` is none of these, or (when drawing) beyond the grid.
    """

    step: int | str = "first"

    def __post_init__(self) -> None:
        if isinstance(self.step, str) and self.step not in ("first", "middle", "last"):
            raise ConfigError(
                f"calibration.distribution.step={self.step}: choose first, middle, last or the number of a step"
            )

    def draw(self, n: int, n_steps: int, rng: np.random.Generator) -> np.ndarray:
        """See `TimeDistribution`."""
        named = {"first": 0, "middle": n_steps // 2, "last": n_steps - 1}
        position = named[self.step] if isinstance(self.step, str) else self.step
        if not 0 <= position < n_steps:
            raise ConfigError(f"calibration.distribution.step={position}: choose 0..{n_steps - 1} (sampler.steps)")
        return np.full(n, n_steps - 1 - position, dtype=np.int64)


def positions(distribution: TimeDistribution, n: int, n_steps: int, seed: int) -> Tensor:
    """Draw `n` positions of an `n_steps`-step `TimeGrid` (0 = noisiest), int64 [n], from `seed` alone."""
    time_index = distribution.draw(n, n_steps, np.random.default_rng(seed))
    return torch.from_numpy(n_steps - 1 - time_index)
