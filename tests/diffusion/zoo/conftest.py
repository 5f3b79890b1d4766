"""Original checkpoints imitated by the fill rule of tests/golden/models/README.md, and comparison with its outputs."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from portable_sines import portable_embedding

MODELS = Path(__file__).parents[2] / "golden" / "models"
SCHEDULE = ("betas", "alphas_cumprod")


class Golden:
    """The stored files of the original networks."""

    def shapes(self, name: str) -> dict[str, list[int]]:
        with gzip.open(MODELS / f"{name}.keys.json.gz") as stream:
            return json.load(stream)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The state dict of `name` by the fill rule."""
        schedule = np.load(MODELS / "ldm4.schedule.npz")
        return {key: torch.from_numpy(schedule[key] if key in SCHEDULE else _filled(key, shape))
                for key, shape in self.shapes(name).items()}

    def hollow(self, name: str) -> dict[str, torch.Tensor]:
        """As `state`, but every tensor is one zero seen in the right shape: kilobytes on disk."""
        schedule = np.load(MODELS / "ldm4.schedule.npz")
        return {key: torch.from_numpy(schedule[key]) if key in SCHEDULE else torch.zeros(()).expand(shape)
                for key, shape in self.shapes(name).items()}

    def file(self, name: str) -> np.lib.npyio.NpzFile:
        return np.load(MODELS / f"{name}.npz")

    def inputs(self, file, i: int, dtype=torch.float32):
        """(x, t, y) of the i-th output of a file; (x, t) without labels, and (x, None) without times."""
        shape = tuple(file["x_shape" if "x_shape" in file else "z_shape"])
        x = np.random.default_rng(int(file["seeds"][i])).standard_normal(shape).astype(np.float32)
        x = np.tanh(x) if "x_is_tanh_of_normal" in file else x
        t = torch.from_numpy(file["timesteps"][i]).to(dtype) if "timesteps" in file else None
        y = [torch.from_numpy(file["labels"][i])] if "labels" in file else []
        return torch.from_numpy(x).to(dtype), t, *y

    @torch.no_grad()
    def deviation(self, network, name: str, dtype=torch.float32) -> float:
        """Largest |network(x, t, y) - stored output| / standard deviation of the output, over a whole file."""
        file = self.file(name)
        worst = 0.0
        for i in range(len(file["seeds"])):
            output = network(*self.inputs(file, i, dtype))
            assert tuple(output.shape) == tuple(file["out_shape"]) and output.dtype == dtype
            difference = output.numpy().ravel()[file["index"]] - file["out"][i]
            worst = max(worst, float(np.abs(difference).max() / file["out_std"][i]))
        return worst


PIECE = 2**16
"""Numbers drawn at a time: they stay in the processor's cache, and are the same as those drawn at once."""


def _filled(key: str, shape: list[int]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(key.encode()))
    a = np.empty(int(np.prod(shape)), np.float32)
    spread = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) >= 2 else np.float32(1)
    for start in range(0, a.size, PIECE):
        piece = a[start : start + PIECE]
        piece[:] = random.standard_normal(piece.size)
        piece[:] = piece * spread
    a = a.reshape(shape)
    if a.ndim >= 2:
        return a
    return np.asarray(1 + np.float32(0.1) * a if key.endswith(".weight") else np.float32(0.1) * a, np.float32)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def shrink():
    """Multiply all weights of two or more dimensions, but not embeddings, as the `small` files want it."""

    def shrink_(module: torch.nn.Module, scale: float) -> None:
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and "embedding.weight" not in name:
                parameter.mul_(scale)

    return shrink_


@pytest.fixture
def saved(tmp_path):
    """Save an object as a PyTorch file; the file is deleted with the test."""
    paths = []

    def save(content, name="model.ckpt", **kwargs) -> str:
        paths.append(tmp_path / name)
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # checksums of gigabytes take longer than writing them
        try:
            torch.save(content, paths[-1], **kwargs)
        finally:
            torch.serialization.set_crc32_options(before)
        return str(paths[-1])

    yield save
    for path in paths:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")  # a test of Ctrl-C in between ends every child of its process
def _portable_embedding():
    with portable_embedding() as embedding:
        yield embedding


@pytest.fixture
def portable_sines(_portable_embedding, monkeypatch):
    """The networks' embeddings of the time are those that the stored outputs had, whatever the processor."""
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", _portable_embedding)
