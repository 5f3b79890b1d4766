"""Which time a calibration state is shown to the network with: its own, or the mismatch of PTQ4DM's published code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptq_exp.diffusion import TimeGrid
from ptq_exp.errors import ConfigError

LABELS = ("paired", "reversed")


@dataclass(frozen=True)
class Labelled:
    """Which states are collected, and the time that each is labelled with.

    Attributes:
        enters: int64 [N], the position of the grid that the state enters; S = none, it left the last step.
        step: int64 [N], the same as a position 0..S-1; the state behind the last step counts to the last.
        t: float32 [N], what the network receives as its time.
    """

    enters: Tensor
    step: Tensor
    t: Tensor

    @property
    def order(self) -> Tensor:
        """Numbers of the samples in the order that batches are made in, int64 [N]: those of the first steps first."""
        return self.enters.argsort(stable=True)


def labelled(positions: Tensor, grid: TimeGrid, labels: str = "paired") -> Labelled:
    """States for the drawn `positions` (int64 [N], 0 = noisiest; see `timesteps.positions`) of an S-step `grid`.

    `paired`: the state that enters the position, with the network time of that position.

    `reversed`: what the code published with PTQ4DM (Shang et al. 2023) does. A drawn time index j (0 = cleanest) is
    used as the number of a pass of the sampling loop, which begins at the noisiest step. The state kept is the one
    *after* pass j, which enters position j + 1; pure noise is never kept, and j = S - 1 gives the finished image. The
    label is j itself: neither mapped through the respaced time steps nor scaled to the network's range of times.

    Raises:
        ConfigError: unknown `labels`.
    """
    if labels not in LABELS:
        raise ConfigError(f"calibration.labels={labels}: choose one of {', '.join(LABELS)}")
    if labels == "paired":
        return Labelled(positions, positions, grid.network_time(positions))
    loop_pass = len(grid) - 1 - positions
    return Labelled(loop_pass + 1, (loop_pass + 1).clamp(max=len(grid) - 1), loop_pass.float())
