"""Regular Hadamard matrices and the sizes of blocks, by reference matrices and by their defining properties."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.transforms import regular_hadamard
from ptq_exp.quantization.transforms.hadamard import block_size

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "kit" / "rotation.npz")


@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_matrices_of_the_reference(n):
    assert np.array_equal((regular_hadamard(n) * n**0.5).numpy(), GOLDEN[f"regular/{n}"])


@pytest.mark.parametrize("n", [1, 4, 16, 64, 256, 1024])
def test_symmetric_orthogonal_and_regular(n):
    h = regular_hadamard(n)
    assert h.dtype == torch.float64 and torch.equal(h, h.T)
    assert torch.equal(h @ h, torch.eye(n, dtype=torch.float64))  # all entries are +-2^-k: no rounding
    assert torch.equal(h.sum(0), torch.ones(n, dtype=torch.float64))
    assert torch.equal(h.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4, 2, 8, 12, 32, 128, 4.0, True])
def test_other_sizes_are_refused(n):
    with pytest.raises(QuantizationError, match="choose a power of 4"):
        regular_hadamard(n)


@pytest.mark.parametrize(
    ("channels", "largest", "parts", "size"),
    [
        (320, 256, (), 64), (1152, 256, (), 64), (256, 256, (), 256), (1024, 256, (), 256), (1024, 1024, (), 1024),
        (72, 256, (), 4), (100, 256, (), 4), (96, 256, (), 16), (64, 16, (), 16),
        (3, 256, (), 1), (6, 256, (), 1), (1, 256, (), 1), (2, 256, (), 1),
        (192, 256, (64, 128), 64), (192, 256, (96, 96), 16), (8, 256, (3, 5), 1), (96, 256, (32, 64), 16),
    ],
)
def test_the_largest_block_that_divides(channels, largest, parts, size):
    assert block_size(channels, largest, parts) == size
