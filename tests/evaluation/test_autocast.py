"""Images are judged in float32, whatever precision the networks around them compute in."""

import numpy as np
import torch

from ptq_exp.evaluation import Perceptual, extract_features
from ptq_exp.evaluation.features import in_float32


class Linear:
    """An extractor of one layer, whose products bfloat16 would round."""

    name, preprocessing = "linear", "none"

    def __init__(self):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(48, 12)

    @torch.no_grad()
    def __call__(self, images):
        x = self.layer(torch.from_numpy(images).float().flatten(1) / 255).numpy()
        return x, x.reshape(-1, 12, 1, 1), x[:, :3]


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)


def test_features_are_of_float32_under_autocast():
    extractor = Linear()
    wanted = extract_features(extractor, IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert extractor.layer(torch.ones(1, 48)).dtype == torch.bfloat16
        found = extract_features(extractor, IMAGES)
        assert torch.is_autocast_enabled("cpu")  # again
    assert found.pooled.dtype == np.float32 and np.array_equal(found.pooled, wanted.pooled)


def test_perceptual_distances_are_of_float32_under_autocast():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Conv2d(3, 1, 3)

        def forward(self, a, b):
            return (self.layer(a) - self.layer(b)).square().mean((1, 2, 3))

    judge = Perceptual(Network(), "alex", "mine", "cpu")
    a, b = (np.random.default_rng(seed).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) for seed in (1, 2))
    wanted = judge(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(judge(a, b), wanted)
    with in_float32():
        assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
