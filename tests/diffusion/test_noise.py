"""Noise streams: what they depend on, what they share, and that they are normal."""

import itertools

import torch

from ptq_exp.diffusion import SampleNoise
from ptq_exp.diffusion.noise import CALIBRATION, EVALUATION, sample_generator


def test_a_sample_depends_on_seed_and_index_alone():
    several = SampleNoise(5, [4, 0, 9], (1, 3, 3))
    alone = SampleNoise(5, [9], (1, 3, 3))
    for _ in range(3):
        assert torch.equal(several.draw()[2], alone.draw()[0])


def test_seed_index_and_stream_each_change_the_noise():
    keys = list(itertools.product(range(6), range(60), (EVALUATION, CALIBRATION, CALIBRATION + 1)))
    seeds = {sample_generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)
    evaluation = SampleNoise(0, [0], (4,)).draw()
    assert torch.equal(evaluation, SampleNoise(0, [0], (4,), stream=EVALUATION).draw())
    assert not torch.equal(evaluation, SampleNoise(0, [0], (4,), stream=CALIBRATION).draw())


def test_samples_that_are_kept_go_on_with_their_own_streams():
    noise, whole = SampleNoise(2, [7, 8, 9], (5,)), SampleNoise(2, [7, 8, 9], (5,))
    assert torch.equal(noise.draw(), whole.draw())
    noise.keep([2, 0])
    assert torch.equal(noise.draw(), whole.draw()[[2, 0]])
    noise.keep([1])
    assert torch.equal(noise.draw(), whole.draw()[[0]])


def test_noise_is_standard_normal_and_independent_between_samples():
    z = SampleNoise(0, range(400), (16, 16)).draw()
    assert z.dtype == torch.float32 and z.shape == (400, 16, 16)
    # 102,400 values: the standard errors are 0.003 and 0.0045
    assert abs(float(z.mean())) < 0.015 and abs(float(z.var()) - 1) < 0.025
    correlation = torch.corrcoef(z.flatten(1))
    # of 79,800 pairs of 256 values, none is correlated by more than 6 standard errors of 1 / 16
    assert float((correlation - torch.eye(400)).abs().max()) < 6 / 16
