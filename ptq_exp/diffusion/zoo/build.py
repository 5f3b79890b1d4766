"""What all builders share: number types, empty or random modules, schedules."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ptq_exp.errors import CheckpointError, ConfigError, one_line
from ptq_exp.storage.finite import extremes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SEED = 0
RANDOM: ContextVar[bool | None] = ContextVar("random_weights", default=None)
MAPPED: ContextVar[float | None] = ContextVar("mapped_weights", default=None)
"""What the call comes from inside of: `random_weights`, `mapped_weights` with the bytes that may be converted."""


class RandomWeightsWarning(UserWarning):
    """A model without a checkpoint: good for timing, useless for images."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the number type of a denoiser.

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
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def random_weights() -> AbstractContextManager[None]:
    """Components of folders that are loaded inside get random weights: the files of weights are not there."""
    return _switched(RANDOM, True)


def mapped_weights(most: float) -> AbstractContextManager[None]:
    """Components of folders that are loaded inside keep their weights in their files, mapped into memory.

    As far as they are wanted in the type that they have there, and no pickles of torch before 1.6: others take memory.

    Args:
        most: bytes that the converted weights of a component may take, and its pickles; with more it is refused.
    """
    return _switched(MAPPED, most)


@contextmanager
def _switched(on: ContextVar, value: float | bool) -> Iterator[None]:
    token = on.set(value)
    try:
        yield
    finally:
        on.reset(token)


def of_random_weights(cls: type[nn.Module], settings: Mapping, where: str) -> nn.Module:
    """Return a module of `diffusers` of the class `cls` with `settings`, which name no code, and random weights.

    Raises:
        CheckpointError: the settings are not those of such a module; the message begins with `where`.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return cls.from_config(dict(settings))
    except Exception as error:  # whatever damaged settings make the library stumble over
        raise CheckpointError(f"{where}: no settings of {cls.__name__} ({one_line(error, 300)})") from error


def random_digest(name: str) -> str:
    """Return the identity of a model with random weights."""
    return f"random-{name}"


def frozen(module: nn.Module, dtype: torch.dtype = torch.float32, checkpoint: object | None = None) -> nn.Module:
    """Return `module` in evaluation mode, without gradients, in `dtype`.

    Raises:
        ConfigError: a number of `module` (read from `checkpoint`, which the message names) is too large for `dtype`.
    """
    require_range(itertools.chain(module.named_parameters(), module.named_buffers()), dtype, checkpoint)
    return module.to(dtype).eval().requires_grad_(False)


def require_range(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, checkpoint: object | None) -> None:
    """Raise ConfigError for a finite number of the tensors (name, values) that becomes infinite in `dtype`."""
    largest = torch.finfo(dtype).max
    for name, values in named:
        if not values.is_floating_point() or torch.finfo(values.dtype).max <= largest:
            continue
        worst = max(extremes(values) or (0.0,), key=abs)
        if math.isfinite(worst) and not _fits(worst, dtype):
            short = str(dtype).removeprefix("torch.")
            wider = [other for other in ("bfloat16", "float32", "float64") if _fits(worst, DTYPES[other])]
            where = "" if checkpoint is None else f" of model.checkpoint={checkpoint}"
            raise ConfigError(
                f"model.dtype={short}: {name}{where} holds {worst:g}, beyond {largest:g}, the largest number of "
                f"{short}; set model.dtype={' or '.join(wider[:2])}"
            )


def _fits(number: float, dtype: torch.dtype) -> bool:
    return bool(torch.tensor(number, dtype=torch.float64).to(dtype).isfinite())


def cosine_alphas_cumprod(total: int, offset: float = 0.008, largest_beta: float = 0.999) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17, as their code has it: betas from quotients, capped; float64 [total]."""
    level = [math.cos((i / total + offset) / (1 + offset) * math.pi / 2) ** 2 for i in range(total + 1)]
    betas = [min(1 - level[i + 1] / level[i], largest_beta) for i in range(total)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def linear_alphas_cumprod(total: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Ho et al. 2020: evenly spaced betas, rounded to float32 as the original trains with; float64 [total]."""
    betas = torch.linspace(start, end, total, dtype=torch.float64).float()
    return (1 - betas.double()).cumprod(0)
