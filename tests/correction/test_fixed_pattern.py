"""Share of a fixed pattern in the error: by hand, at both ends, for pure noise, and after a correction."""

import numpy as np
import pytest
import torch

from ptq_exp.correction import MomentChunks, fit_moments, fixed_pattern_share, sample_moments, share_of_noise


def share(eps, error, statistics=None):
    """Of eps and error [N, S, C, H, W]: `fixed_pattern_share`."""
    n, steps = eps.shape[:2]
    eps, error = eps.double(), error.double()
    moments = torch.stack([sample_moments(eps[:, s], eps[:, s] + error[:, s]) for s in range(steps)], 1).unsqueeze(1)
    return fixed_pattern_share(error.sum(0), n, MomentChunks(moments.numpy()), steps, statistics, eps.sum(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_samples_by_hand():
    # step 0: errors (1, 0) and (0, 1): mean (1/2, 1/2), norm sqrt(1/2); both have norm 1
    # step 1: (3, 0) and (1, 0): mean (2, 0), norm 2; mean squared norm 5
    # step 2: opposite errors; step 3: none
    errors = [[[1, 0], [3, 0], [1, 2], [0, 0]], [[0, 1], [1, 0], [-1, -2], [0, 0]]]
    error = torch.tensor(errors).view(2, 4, 1, 1, 2)
    torch.testing.assert_close(
        share(normal(2, 4, 1, 1, 2), error), torch.tensor([0.5**0.5, 2 / 5**0.5, 0, 0], dtype=torch.float64)
    )


def test_an_error_that_all_samples_share_has_the_share_1_whatever_the_estimates():
    error = normal(1, 3, 2, 4, 4, seed=1).expand(6, -1, -1, -1, -1)
    found = share(normal(6, 3, 2, 4, 4), error)
    torch.testing.assert_close(found, torch.ones(3, dtype=torch.float64))
    assert float(found.max()) <= 1


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_noise_alone_has_about_one_over_the_root_of_the_number_of_samples(n):
    found = share(normal(n, 2, 3, 24, 24), normal(n, 2, 3, 24, 24, seed=1))
    assert found.tolist() == pytest.approx([share_of_noise(n)] * 2, rel=0.05)
    assert share_of_noise(n) == n**-0.5


def test_pattern_and_noise_add_up_in_squares():
    n, pattern = 25, normal(1, 1, 3, 24, 24, seed=2)
    found = share(normal(n, 1, 3, 24, 24), pattern + 0.5 * normal(n, 1, 3, 24, 24, seed=3))
    assert float(found) == pytest.approx(((1 + 0.25 / n) / 1.25) ** 0.5, rel=0.02)


def test_after_a_correction_it_is_that_of_the_corrected_estimates():
    n, steps = 8, 3
    eps, pattern = normal(n, steps, 2, 4, 4), normal(1, steps, 2, 4, 4, seed=4)
    error = 0.1 * eps + pattern + 0.3 + 0.2 * normal(n, steps, 2, 4, 4, seed=5)
    moments = torch.stack([sample_moments(eps[:, s], (eps + error)[:, s]) for s in range(steps)], 1).unsqueeze(1)
    statistics = fit_moments(MomentChunks(moments.numpy()), steps, 16)
    slope, bias = statistics.slope.view(steps, 1, 1, 1), statistics.bias.view(steps, 2, 1, 1)
    left = ((eps + error - bias) / (1 + slope) - eps).numpy()
    norms = np.sqrt((left**2).sum((2, 3, 4)).mean(0))
    expected = np.sqrt((left.mean(0) ** 2).sum((1, 2, 3))) / norms
    np.testing.assert_allclose(share(eps, error, statistics), expected, rtol=1e-10)
