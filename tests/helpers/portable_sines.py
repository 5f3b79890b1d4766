"""Sinusoidal embeddings of the time with the same bits on every processor.

The original networks compute them in float32, as diffusers does. Torch takes exp, sin and cos from MKL, which differ in
the last place between processors: 1e-8 in an output of float64. In its compatible mode MKL gives the same bits
everywhere, but slowly and for a whole process: so a process of its own computes them.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch


def _embedding(timesteps: torch.Tensor, *arguments) -> torch.Tensor:
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(timesteps, *arguments)


@contextmanager
def portable_embedding() -> Iterator[Callable[..., torch.Tensor]]:
    """Stand-in for diffusers' `get_timestep_embedding`, with its arguments."""
    before = os.environ.get("MKL_CBWR")
    os.environ["MKL_CBWR"] = "COMPATIBLE"  # read when a process first calls MKL
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_embedding, torch.zeros(1), 2).result()
        if before is None:
            del os.environ["MKL_CBWR"]
        else:
            os.environ["MKL_CBWR"] = before

        def embedding(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=1e4):
            order = (embedding_dim, flip_sin_to_cos, downscale_freq_shift, scale, max_period)
            return process.submit(_embedding, timesteps, *order).result()

        yield embedding
