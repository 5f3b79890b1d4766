"""Classifier-free guidance by hand, and class labels: balanced, and of (seed, index) alone."""

from dataclasses import replace

import pytest
import torch

from ptq_exp.diffusion import Call, ConditionTable, FirstStage, Guided, both_halves
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.errors import ConfigError, DataError

X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
T, Y = torch.full((3,), 7.0), torch.tensor([2, 0, 5])


@pytest.fixture
def classes(toy):
    return replace(toy, n_classes=6, null_label=9)


def test_guided_eps_by_hand(toy):
    cond, uncond = toy.denoiser(X, T, Y), toy.denoiser(X, T, torch.tensor([9, 9, 9]))
    toy.denoiser.calls.clear()
    guided = Guided(toy.denoiser, 3.0, {"y": 9})(X, T, y=Y)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond))
    (x, t, y), = toy.denoiser.calls
    assert len(x) == len(t) == 6 and y.tolist() == [9, 9, 9, 2, 0, 5]


def test_scale_zero_is_unconditional_and_scale_one_costs_one_half(toy):
    none = torch.tensor([9, 9, 9])
    torch.testing.assert_close(Guided(toy.denoiser, 0.0, {"y": 9})(X, T, y=Y), toy.denoiser(X, T, none))
    toy.denoiser.calls.clear()
    assert torch.equal(Guided(toy.denoiser, 1.0, {"y": 9})(X, T, y=Y), toy.denoiser(X, T, Y))
    assert [len(x) for x, *_ in toy.denoiser.calls] == [3, 3]


def test_both_halves_stand_unconditional_first():
    tokens, none, size = torch.rand(3, 2, 4), torch.rand(2, 4), torch.arange(3)
    given = {"y": Y, "tokens": tokens, "size": size}
    x, t, conditions = both_halves(Call(X, T, given), {"y": 9, "tokens": none})
    assert torch.equal(x, torch.cat([X, X])) and t.tolist() == [7.0] * 6
    assert conditions["y"].tolist() == [9, 9, 9, 2, 0, 5] and conditions["y"].dtype == torch.long
    assert torch.equal(conditions["tokens"], torch.cat([none[None].expand(3, 2, 4), tokens]))
    assert conditions["size"].tolist() == [0, 1, 2, 0, 1, 2]  # nothing says what a sample without it has


def test_a_model_without_classes_refuses_guidance(toy, classes):
    assert toy.guided(toy.denoiser, 1.0) is toy.denoiser
    with pytest.raises(ConfigError, match=r"sampler\.guidance_scale=2\.0: the model toy has no class"):
        toy.guided(toy.denoiser, 2.0)
    assert classes.guided(classes.denoiser, 2.0).unconditional == {"y": 9}
    with pytest.raises(ConfigError, match=r'has no label that means "no class"; choose 1'):
        replace(classes, null_label=None).guided(classes.denoiser, 2.0)
    table = ConditionTable({"y": torch.arange(3)})
    with pytest.raises(ConfigError, match=r"has no unconditional\.y in model\.conditions"):
        replace(toy, conditions=table).guided(toy.denoiser, 2.0)


def test_labels_are_balanced_and_of_seed_and_index_alone(toy, classes):
    labels = classes.labels(range(60), 0)
    assert labels.bincount().tolist() == [10] * 6
    assert sorted(labels[6:12].tolist()) == list(range(6))
    assert torch.equal(classes.labels([41, 3, 3], 0), labels[[41, 3, 3]])
    others = [classes.labels(range(6), seed).tolist() for seed in range(8)]
    assert len({tuple(order) for order in others}) > 1
    assert any(classes.labels(range(6), s, CALIBRATION).tolist() != others[s] for s in range(8))
    assert toy.labels(range(3), 0) is None


def test_images_of_a_sample_and_its_label_do_not_depend_on_its_company(classes):
    grid, guided = classes.time_grid(4), classes.guided(classes.denoiser, 2.0)
    together = classes.sample(guided, grid, range(7), 3)
    assert torch.equal(classes.sample(guided, grid, [5, 2], 3), together[[5, 2]])


class Half(torch.nn.Module):
    """An autoencoder of even pixels: latents are every second value, twice as large."""

    def encode(self, images):
        return type("Encoded", (), {"latents": 2 * images[..., ::2, ::2]})

    def decode(self, z):
        return type("Decoded", (), {"sample": (z / 2).repeat_interleave(2, -1).repeat_interleave(2, -2)})


def test_first_stage_scales_latents_and_takes_images_of_its_size_alone(toy):
    latent = replace(toy, first_stage=FirstStage(Half(), 3.0), image_shape=(1, 4, 4))
    images = X.repeat_interleave(2, -1).repeat_interleave(2, -2)
    z = latent.encode(images)
    torch.testing.assert_close(z, 6 * X)
    torch.testing.assert_close(latent.decode(z), images)
    drawn = latent.sample(latent.denoiser, latent.time_grid(2), range(2), 0)
    states = latent.run(latent.denoiser, latent.time_grid(2), range(2), 0)
    assert drawn.shape == (2, 1, 4, 4) and torch.equal(drawn, latent.decode(states))
    with pytest.raises(DataError, match=r"images are \(1, 2, 2\), but the model toy works on \(1, 4, 4\)"):
        latent.encode(X)
