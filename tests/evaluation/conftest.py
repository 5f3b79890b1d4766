"""Small image sets of every kind with a cheap extractor for them."""

import pickle

import numpy as np
import pytest
from PIL import Image


class ToyExtractor:
    """Pooled: 5 means of image regions; map: 8 rows of the image; logits: 3 pixels. Any size from 4x8 on."""

    name = "toy"
    preprocessing = "none"
    feature_sizes = (5, 28)

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        assert isinstance(images, np.ndarray) and images.dtype == np.uint8
        self.batches.append(len(images))
        x = images.astype(np.float32).mean(axis=3) / 255
        pooled = np.stack([x[:, :, i].mean(axis=1) for i in range(5)], axis=1)
        return pooled, x[:, :4, :8].transpose(0, 2, 1).reshape(len(x), 8, 2, 2), x[:, 0, :3]


@pytest.fixture
def toy():
    return ToyExtractor()


@pytest.fixture
def colour_images():
    return np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def write_folder(tmp_path):
    """Writes images uint8 [N, H, W, C] as PNG files, one of them in a subfolder; returns the folder."""

    def write(images, name="images"):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        for i, image in enumerate(images):
            sub = "sub/" if i == len(images) - 1 else ""
            Image.fromarray(image.squeeze()).save(folder / f"{sub}{i:03d}.png")
        return folder

    return write


@pytest.fixture
def write_cifar(tmp_path):
    """Writes images uint8 [N, 32, 32, 3] as the five training batches of CIFAR-10, and one test image."""

    def write(images, protocol=2):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        parts = dict(zip([f"data_batch_{i}" for i in range(1, 6)], np.array_split(rows, 5), strict=True))
        for name, data in (parts | {"test_batch": rows[:1]}).items():
            batch = {b"batch_label": name.encode(), b"labels": [0] * len(data), b"data": data}
            (folder / name).write_bytes(pickle.dumps(batch, protocol))
        return folder

    return write
