"""What all builders share: number types, empty or random modules, schedules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SEED = 0


class RandomWeightsWarning(UserWarning):
    """A model without a checkpoint: good for timing, useless for images."""


def torch_dtype(name: str) -> torch.dtype:
    """The number type of a denoiser.

    Raises:
        ConfigError: none of the names in `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"model.dtype={name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def empty_or_random(name: str, checkpoint: object | None) -> Iterator[None]:
    """Modules built inside are empty (meta device) where a checkpoint fills them, else random, always the same.

    Warns:
        RandomWeightsWarning: there is no checkpoint.
    """
    if checkpoint is not None:
        with torch.device("meta"):
            yield
        return
    warnings.warn(
        f"model {name}: no checkpoint is given, random weights: for benchmarks only (set model.checkpoint)",
        RandomWeightsWarning, stacklevel=5,  # where the model was asked for
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def random_digest(name: str) -> str:
    """The identity of a model with random weights."""
    return f"random-{name}"


def frozen(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`module` in evaluation mode, without gradients, in `dtype`."""
    return module.to(dtype).eval().requires_grad_(False)


def cosine_alphas_cumprod(total: int, offset: float = 0.008, largest_beta: float = 0.999) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17, as their code has it: betas from quotients, capped; float64 [total]."""
    level = [math.cos((i / total + offset) / (1 + offset) * math.pi / 2) ** 2 for i in range(total + 1)]
    betas = [min(1 - level[i + 1] / level[i], largest_beta) for i in range(total)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def linear_alphas_cumprod(total: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Ho et al. 2020: evenly spaced betas, rounded to float32 as the original trains with; float64 [total]."""
    betas = torch.linspace(start, end, total, dtype=torch.float64).float()
    return (1 - betas.double()).cumprod(0)
