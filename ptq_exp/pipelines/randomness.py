"""Random numbers that a pipeline draws beside its generators."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)


@contextmanager
def own_random_numbers(seed: int, device: torch.device, who: str | None = None) -> Iterator[None]:
    """While in force, torch's own random numbers begin at `seed`; afterwards they go on where they stood.

    Some schedulers and pipelines draw from them although a generator is given. Their images are the same in each run,
    but not in each batch, of which a line in the log warns.

    Args:
        who: named in that line; None = no warning.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        before = _states(device)
        yield
        further = any(not torch.equal(one, other) for one, other in zip(before, _states(device), strict=True))
        if further and who is not None:
            log.warning(
                "%s draws random numbers beside those of its generators (its scheduler does not pass them on): its "
                "images depend on which ones are drawn together", who,
            )


def _states(device: torch.device) -> list[torch.Tensor]:
    of_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *of_device]
