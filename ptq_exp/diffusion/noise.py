"""Noise that depends on (seed, sample index) alone: image i is the same for any order, batch or device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

EVALUATION, CALIBRATION = 0, 1
"""Streams: a calibration trajectory never shares its noise with an image that is scored."""


def sample_generator(seed: int, index: int, stream: int = EVALUATION) -> torch.Generator:
    """Return a CPU generator for sample `index` of `seed` in one of the streams (all >= 0)."""
    state = np.random.SeedSequence((seed, index, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class SampleNoise:
    """One stream of N(0, 1) noise per sample index.

    `draw()` gives the next [N, *shape] float32 on the CPU: the initial state first, then the noise of each step, so
    that a trajectory that stops early has consumed a prefix of the full one's stream.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], stream: int = EVALUATION
    ) -> None:
        self.generators = [sample_generator(seed, int(i), stream) for i in indices]
        self.shape = tuple(shape)

    def draw(self) -> Tensor:
        """Return the next noise of every sample, [N, *shape]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])

    def keep(self, chosen: Sequence[int]) -> None:
        """Forget all samples but those at the positions `chosen`."""
        self.generators = [self.generators[int(i)] for i in chosen]
