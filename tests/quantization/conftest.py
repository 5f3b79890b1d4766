"""A U-Net small enough for unit tests that has convolutions, linear layers and attention."""

import copy

import pytest
import torch
from diffusers import UNet2DModel


@pytest.fixture(scope="session")
def _unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture
def unet(_unet) -> UNet2DModel:
    """A fresh copy with fixed random weights; input ``[B, 1, 8, 8]`` and time ``[B]``."""
    return copy.deepcopy(_unet)


@pytest.fixture
def example() -> tuple[torch.Tensor, torch.Tensor]:
    """One sample for `unet`."""
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four samples for `unet` at four different times."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([1.0, 250.0, 500.0, 999.0])
