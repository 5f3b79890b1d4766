"""The InceptionV3 of published FID, sFID, IS, precision and recall, as torch-fidelity ported it from TensorFlow."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from ptq_exp.errors import CheckpointError, ConfigError
from ptq_exp.evaluation.features import in_float32
from ptq_exp.evaluation.images import as_images
from ptq_exp.evaluation.statistics import SPATIAL_CHANNELS
from ptq_exp.evaluation.tensors import read_tensors
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.finite import require_finite

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Published by torch-fidelity; the digits at the end are those with which its SHA-256 begins."""

_SIDE = 299
_MAP_SIDE = 17
_CONNECT_SECONDS = 20
_PREPROCESSING = {
    "adm": "TensorFlow-1 bilinear to 299x299 without antialiasing, (x - 128) / 128",
    "clean": "PIL bicubic with antialiasing to 299x299 in float without rounding (clean-fid), (x - 128) / 128",
}


class InceptionExtractor:
    """InceptionV3 of 2015 (1008 classes): pooled 2048, the map of sFID 7 x 17 x 17, logits 1008.

    The map is the output of `mixed_6/conv` in TensorFlow's names, `Mixed_6d.branch1x1` (after its ReLU) in PyTorch's,
    the first seven channels; the logits are without bias, as the Inception Score of both the ADM evaluator
    and torch-fidelity has them.

    Args:
        weights: a local copy of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None = the copy
            in the cache of `torch.hub`, downloaded if it is not there.
        device: where the network runs.
        resize: `adm` is the preprocessing inside the TensorFlow graph, which the ADM evaluator, the original FID and
            torch-fidelity share. `clean` is that of clean-fid before the same network, so that the numbers are
            comparable with clean-fid's (whose own file is a TorchScript export of the same weights).

    Raises:
        CheckpointError: the weights are missing and cannot be downloaded, are damaged, or of another network.
        ConfigError: another `resize`, or no such device.
    """

    feature_sizes = (2048, SPATIAL_CHANNELS * _MAP_SIDE**2)

    def __init__(
        self, weights: str | None = None, device: str = "cpu", resize: Literal["adm", "clean"] = "adm"
    ) -> None:
        if resize not in _PREPROCESSING:
            raise ConfigError(f"evaluation.extractor.resize={resize}: choose {' or '.join(_PREPROCESSING)}")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"evaluation.extractor.device={device}: no CUDA device here; choose cpu")
        path = Path(weights) if weights else _cached_weights()
        network = _network(path).to(device)
        layers = list(network.children())  # in the order of the forward pass, the classifier last
        split = layers.index(network.Mixed_6d)
        self._stem, self._top = nn.Sequential(*layers[:split]), nn.Sequential(*layers[split:-1])
        self._spatial, self._classifier = network.Mixed_6d.branch1x1, network.fc
        self._resize = _RESIZERS[resize]()
        self._device = device
        self.preprocessing = _PREPROCESSING[resize]
        self.name = f"inception-{file_digest(path)[:8]}-{resize}"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features of images uint8 [N, H, W, 1 or 3]; one channel is repeated to three.

        Returns:
            pooled [N, 2048], map [N, 7, 17, 17] (channel, row, column), logits [N, 1008], float32.

        Raises:
            DataError: not uint8 [N, H, W, 1 or 3].
        """
        images = as_images(images, "images")
        if images.shape[3] == 1:
            images = images.repeat(3, axis=3)
        with in_float32():  # as the published numbers were made
            stem = self._stem((self._resize(images, self._device) - 128) / 128)
            spatial = self._spatial(stem)[:, :SPATIAL_CHANNELS]
            pooled = self._top(stem).flatten(1)
            logits = pooled @ self._classifier.weight.T
        return pooled.cpu().numpy(), spatial.cpu().numpy(), logits.cpu().numpy()


def _adm_resizer() -> Callable[[np.ndarray, str], torch.Tensor]:
    """uint8 [N, H, W, 3] -> float32 [N, 3, 299, 299] in [0, 255], on the device."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    def resize(images: np.ndarray, device: str) -> torch.Tensor:
        x = torch.tensor(images, device=device).permute(0, 3, 1, 2).float()
        return interpolate_bilinear_2d_like_tensorflow1x(x, size=(_SIDE, _SIDE), align_corners=False)

    return resize


def _clean_resizer() -> Callable[[np.ndarray, str], torch.Tensor]:
    """As `_adm_resizer`; clean-fid resizes image by image and channel by channel, on the CPU."""
    from cleanfid.resize import build_resizer

    resize_one = build_resizer("clean")

    def resize(images: np.ndarray, device: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([resize_one(image) for image in images])).to(device).permute(0, 3, 1, 2)

    return resize


_RESIZERS = {"adm": _adm_resizer, "clean": _clean_resizer}


def _network(path: Path) -> nn.Module:
    """torch-fidelity's network with the weights of the file at `path`, in evaluation mode.

    The library itself unpickles whatever is in the file. Here the file is read as plain tensors, and the library
    gets a copy of those that was written in memory.

    Raises:
        CheckpointError: no such file, damaged, no weights, or weights of another network.
    """
    # imported here: it takes two seconds that `import ptq_exp.evaluation` need not
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    setting = "evaluation.weights"
    state = read_tensors(path, setting, f"torch-fidelity's {WEIGHTS_FILE}")
    require_finite(state, f"{setting}={path}", "download the file again", CheckpointError)
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    features = ["2048", "logits_unbiased"]
    try:
        return FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=copy)
    except RuntimeError as error:  # names all that differs, in one line of a kind
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:])[:200]
        raise CheckpointError(
            f"{setting}={path}: weights of another network ({reason}); expected {WEIGHTS_FILE}"
        ) from error


def _cached_weights() -> Path:
    """torch-fidelity's file in the cache of `torch.hub`, downloaded if it is not there.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(URL_INCEPTION_V3)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _connect_timeout(_CONNECT_SECONDS):
            digest = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no space; another digest
        raise CheckpointError(
            f"the Inception weights cannot be downloaded ({error}); get {URL_INCEPTION_V3} on another machine and "
            f"set evaluation.weights=PATH to {WEIGHTS_FILE}"
        ) from error
    return path


@contextmanager
def _connect_timeout(seconds: float) -> Iterator[None]:
    """Limit every wait for the network: `torch.hub` sets none, and some firewalls never answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
