"""LPIPS of pairs of images, by the package `lpips` with weights from a local file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq_exp.errors import CheckpointError, ConfigError, DataError, one_line
from ptq_exp.evaluation.features import in_float32
from ptq_exp.evaluation.tensors import read_tensors
from ptq_exp.storage.atomic import file_digest

SETTING = "evaluation.lpips"
_FILES = "torchvision's alexnet-owt-7be5be79.pth, vgg16-397923af.pth or squeezenet1_1-b8a52dc0.pth"
_SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}
_SIDE = 64  # of the patches that the heads were trained on: smaller images are enlarged to it, or beyond
_BATCH = 16


@dataclass(frozen=True)
class Perceptual:
    """LPIPS v0.1 with one trunk.

    Attributes:
        network: of the package `lpips`, in evaluation mode.
        trunk: `alex`, `vgg` or `squeeze`.
        name: trunk and digest of its weights: numbers of different trunks are not comparable.
        device: where it runs.
    """

    network: Any
    trunk: str
    name: str
    device: str = "cpu"

    @classmethod
    def load(cls, weights: str | Path | None, device: str = "cpu") -> Perceptual:
        """Read the trunk from a file, whose layers say which one it is; nothing is downloaded.

        Args:
            weights: PyTorch or safetensors file: torchvision's classifier, whose convolutions are the trunk, or all
                weights of an `lpips.LPIPS`. The heads are those of the package, unless the file has its own.

        Raises:
            CheckpointError: None, no such file, damaged, or weights of another network.
            ConfigError: the package `lpips` is not installed.
        """
        if weights is None:
            raise CheckpointError(f"{SETTING} is not set: LPIPS needs the weights of its trunk, the file {_FILES}")
        package = _package()
        path = Path(weights)
        state = read_tensors(path, SETTING, _FILES)
        trunk = _trunk_of(state, path)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the network is made of random weights
            warnings.simplefilter("ignore")  # torchvision's words on how the package makes its networks
            network = package.LPIPS(net=trunk, pnet_rand=True, verbose=False)
        own = network.state_dict()
        found = {key: state[stored] for key in own if (stored := _stored_name(key, state)) is not None}
        missing = [key for key in own if key.startswith("net.") and key not in found]
        wrong = [key for key in found if found[key].shape != own[key].shape]
        if missing or wrong:
            raise CheckpointError(f"{SETTING}={path}: {(missing or wrong)[0]} of the {trunk} trunk is missing or of "
                                  f"another shape; expected {_FILES}")
        network.load_state_dict(found, strict=False)
        return cls(network.to(device).requires_grad_(False), trunk, f"{trunk}-{file_digest(path)[:8]}", device)

    def factor(self, height: int, width: int) -> int:
        """Return how many times images are enlarged: 1 where the trunk can read them as they are."""
        side = min(height, width)
        return 1 if side >= _SMALLEST[self.trunk] else -(-_SIDE // side)

    @torch.no_grad()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compute LPIPS of images uint8 [N, H, W, 1 or 3] -> float64 [N]; grey ones are repeated to three channels.

        Raises:
            DataError: not uint8, or different shapes.
        """
        from ptq_exp.evaluation.images import from_uint8

        if np.shape(a) != np.shape(b):
            raise DataError(f"lpips compares image by image: shapes {np.shape(a)} and {np.shape(b)} differ")
        factor = self.factor(*np.shape(a)[1:3])
        values = []
        for start in range(0, len(a), _BATCH):
            pair = [from_uint8(images[start : start + _BATCH]).expand(-1, 3, -1, -1) for images in (a, b)]
            pair = [x.repeat_interleave(factor, 2).repeat_interleave(factor, 3).to(self.device) for x in pair]
            with in_float32():
                values.append(self.network(*pair).double().flatten().cpu().numpy())
        return np.concatenate(values) if values else np.empty(0)


def lpips(a: np.ndarray, b: np.ndarray, weights: str | Path | None, device: str = "cpu") -> np.ndarray:
    """Compute the learned perceptual distance (Zhang et al. 2018, v0.1) of each pair of images.

    Args:
        a, b: uint8 [N, H, W, 1 or 3] of one shape. Images that are too small for the trunk are enlarged by the least
            whole factor that makes their smaller side 64 pixels, without interpolation.
        weights, device: see `Perceptual.load`.

    Returns:
        float64 [N], 0 where the two images are identical.

    Raises:
        CheckpointError, ConfigError: see `Perceptual.load`.
        DataError: see `Perceptual`.
    """
    return Perceptual.load(weights, device)(a, b)


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lpips as package
    except ImportError as error:
        raise ConfigError(f"{SETTING} needs the package lpips ({one_line(error)}): pip install 'ptq-exp[pairs]'"
                          ) from error
    return package


def _trunk_of(state: dict[str, torch.Tensor], path: Path) -> str:
    """Say whose convolutions these are."""
    names = {key.split("features.")[-1] if "features." in key else ".".join(key.split(".")[2:]) for key in state}
    if any(".squeeze." in name for name in names):
        return "squeeze"
    if "28.weight" in names:
        return "vgg"
    if "10.weight" in names:
        return "alex"
    raise CheckpointError(f"{SETTING}={path}: holds {', '.join(list(state)[:3]) or 'nothing'}; expected {_FILES}")


def _stored_name(key: str, state: dict[str, torch.Tensor]) -> str | None:
    """Return the name in the file of `key` of the package's network; None where the file does not have it."""
    if key in state:
        return key
    if not key.startswith("net.slice"):
        return None
    torchvision = "features." + key.split(".", 2)[2]
    return torchvision if torchvision in state else None
