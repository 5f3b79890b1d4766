"""The embedded data set."""

import pytest
import torch
from sklearn.datasets import load_digits

from ptq_exp.embedded import digits


def test_all_real_scans_in_range():
    images, labels = digits()
    assert images.shape == (1797, 1, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert float(images.min()) == -1 and float(images.max()) == 1
    # known counts of the ten classes
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_images_are_the_scans_enlarged():
    images, labels = digits()
    bunch = load_digits()
    assert labels.tolist() == bunch.target.tolist()
    # halving the size again gives the scan back, but for the overshoot and smoothing of bicubic interpolation
    halved = torch.nn.functional.avg_pool2d(images, 2)[:, 0]
    scans = torch.from_numpy(bunch.images).float() / 8 - 1
    assert float((halved - scans).abs().mean()) < 0.1
    assert float((halved.transpose(1, 2) - scans).abs().mean()) > 0.3


def test_splits_are_disjoint_and_complete():
    everything, train, held_out = digits(), digits("train"), digits("held_out")
    assert len(train.labels) == 1437 and len(held_out.labels) == 360
    assert torch.equal(held_out.images, everything.images[::5])
    chosen = torch.arange(1797) % 5 != 0
    assert torch.equal(train.images, everything.images[chosen])
    assert torch.equal(train.labels, everything.labels[chosen])
    # no held-out scan is a copy of a training one
    assert float(torch.cdist(held_out.images.flatten(1), train.images.flatten(1)).min()) > 0.1
    # every class is held out about as often as it occurs
    assert int(torch.bincount(held_out.labels, minlength=10).min()) >= 20


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match="split='test': choose one of all, train, held_out"):
        digits("test")
