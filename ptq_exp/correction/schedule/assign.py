"""Which activation width each sampling step gets: by the signal-to-noise rule, or by a budget of bit operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptq_exp.diffusion import TimeGrid
from ptq_exp.errors import ConfigError


def forward_snr(grid: TimeGrid) -> Tensor:
    """Signal-to-noise ratio of the forward process at each step, alpha_bar / (1 - alpha_bar), float64 [S]."""
    return grid.alphas_cumprod / (1 - grid.alphas_cumprod)


def snr_rows(output_snr: Tensor, forward: Tensor) -> Tensor:
    """PTQD, section 4.3: for each step the lowest width whose output SNR exceeds that of the forward process.

    Args:
        output_snr: ||eps||^2 / ||eps_q - eps||^2 of each step and width, [S, W], widths ascending.
        forward: [S], see `forward_snr`.

    Returns:
        Positions among the widths, int64 [S]; the last one where no width is enough.
    """
    enough = output_snr > forward.view(-1, 1)
    enough[:, -1] = True
    return enough.int().argmax(1)


def budget_rows(damage: Tensor, cost: Sequence[int], budget: float, repeats: Tensor | None = None) -> Tensor:
    """Return the widths that minimise the summed damage of all steps at a summed cost of at most `budget`, exactly.

    Dynamic programming over the steps; its states are the sums of costs that can be reached, of which there are few, as
    all steps choose from the same costs. Of equal damages the cheaper choice is kept.

    Args:
        damage: of each step and width, [S, W], finite.
        cost: of one evaluation at each width (bit operations), W integers.
        budget: upper bound of the sum over all S steps.
        repeats: int64 [S], the first position with the same network time (`TimeGrid.first_with_time`): such positions
            get one width. None = all differ.

    Returns:
        Positions among the widths, int64 [S].

    Raises:
        ConfigError: the budget is below S times the least cost; or the damages are not finite.
    """
    steps, widths = damage.shape
    if len(cost) != widths:
        raise ConfigError(f"{widths} widths have damages, but {len(cost)} have costs")
    if not bool(torch.isfinite(damage).all()):
        raise ConfigError("the damage of a step is NaN or infinite: the widths cannot be weighed against each other")
    if budget < steps * min(cost):
        raise ConfigError(
            f"a budget of {budget:.4g} bit operations is below the {steps * min(cost):.4g} of all steps at the lowest "
            "width"
        )
    repeats = torch.arange(steps) if repeats is None else repeats
    _, group = repeats.unique(return_inverse=True)
    sizes = torch.bincount(group)
    grouped = torch.zeros(len(sizes), widths, dtype=torch.float64).index_add_(0, group, damage.double())
    return _cheapest(grouped.numpy(), np.outer(sizes.numpy(), np.asarray(cost, dtype=np.int64)), budget)[group]


def _cheapest(damage: np.ndarray, cost: np.ndarray, budget: float) -> Tensor:
    """`budget_rows` for costs of each step and width, both [S, W]."""
    sums, least = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for own, price in zip(damage, cost, strict=True):
        reached = np.add.outer(price, sums)
        total = np.add.outer(own, least)
        allowed = reached <= budget
        width, previous = np.nonzero(allowed)
        sums, least, kept = _best_of_each_sum(reached[allowed], total[allowed])
        history.append((width[kept], previous[kept]))
    best = int(np.lexsort((sums, least))[0])
    rows = []
    for width, previous in reversed(history):
        rows.append(int(width[best]))
        best = int(previous[best])
    return torch.tensor(rows[::-1])


def _best_of_each_sum(sums: np.ndarray, damage: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct sums, the least damage of each, and where it stood."""
    order = np.lexsort((damage, sums))
    first = np.ones(len(order), dtype=bool)
    first[1:] = sums[order][1:] != sums[order][:-1]
    kept = order[first]
    return sums[kept], damage[kept], kept
