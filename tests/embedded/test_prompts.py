"""Prompts and the attributes that they name."""

from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import rotate

from ptq_exp.embedded.attributes import levels, real_statistics, slant, standardised, stroke_width
from ptq_exp.embedded.digits import digits
from ptq_exp.embedded.prompts import HELD_OUT, LEVELS, Asked, asked, evaluation_prompts, prompt
from ptq_exp.evaluation.images import to_uint8


def test_prompts_by_hand():
    assert prompt(7, 1, 1) == "a thick slanted seven"
    assert prompt(0, -1, -1) == "a thin left-slanted zero"
    assert prompt(4, 0, 0) == "an upright four"
    assert (prompt(8), prompt(1), prompt(8, -1)) == ("an eight", "a one", "a thin eight")
    assert prompt(5) == "a five"
    with pytest.raises(KeyError):
        prompt(5, 2)


def test_every_prompt_reads_back():
    for digit in range(10):
        for width in LEVELS:
            for lean in (*LEVELS, None):
                assert asked(prompt(digit, width, lean)) == Asked(digit, width, lean)
    assert asked("A THIN nine") == Asked(9, -1, None)


@pytest.mark.parametrize(
    "text", ["", "a red fox", "a one two", "a thin thick one", "a slanted upright one", "thickone"]
)
def test_what_names_no_single_digit_reads_as_none(text):
    assert asked(text) is None


def test_evaluation_prompts_hold_every_combination_once_in_ninety():
    prompts = evaluation_prompts(180)
    wanted = [asked(text) for text in prompts]
    assert [combination.digit for combination in wanted] == [i % 10 for i in range(180)]
    assert len(set(wanted[:90])) == 90 and wanted[90:] == wanted[:90]
    # the first thirty are no single column of the table
    assert len({(w.width, w.slant) for w in wanted[:10]}) == 9
    assert evaluation_prompts(7) == prompts[:7]


def test_one_combination_of_each_digit_is_held_out_and_every_pair_of_levels_occurs():
    assert sorted(combination.digit for combination in HELD_OUT) == list(range(10))
    assert {(c.width, c.slant) for c in HELD_OUT} == {(w, s) for w in LEVELS for s in LEVELS}


def bar(width, size=32):
    """A vertical bar of ink, `width` pixels wide."""
    image = np.zeros((size, size), np.uint8)
    start = (size - width) // 2
    image[4:-4, start : start + width] = 255
    return image


def test_stroke_width_of_bars_is_their_width():
    images = np.stack([bar(width, 64) for width in (2, 4, 6, 8)])[..., None]
    # a little less than the width, because the distances shrink at the two ends
    assert stroke_width(images) == pytest.approx([2, 4, 6, 8], abs=0.6)
    assert stroke_width(np.zeros((1, 8, 8, 1), np.uint8)).tolist() == [0]


def test_slant_is_the_tangent_of_the_angle_to_the_right():
    angles = np.array([-20, -10, 0, 10, 20])
    # scipy rotates from the first axis (down) to the second: counterclockwise to the eye for positive angles
    images = np.stack([rotate(bar(4).astype(float), -angle, reshape=False, order=1) for angle in angles])
    measured = slant(images.clip(0, 255).astype(np.uint8)[..., None])
    assert measured == pytest.approx(np.tan(np.radians(angles)), abs=0.03)
    assert slant(np.zeros((1, 8, 8, 1), np.uint8)).tolist() == [0]


@pytest.mark.parametrize("measure", ["width", "slant"])
def test_levels_are_thirds_of_each_class(measure):
    data = digits("all", 32)
    images, labels = to_uint8(data.images), data.labels.numpy()
    found = levels(measure, images, labels)
    for label in range(10):
        shares = Counter(found[labels == label].tolist())
        assert all(abs(shares[level] / (labels == label).sum() - 1 / 3) < 0.01 for level in LEVELS)
    values = standardised(measure, images, labels)
    for label in range(10):
        assert values[labels == label].mean() == pytest.approx(0, abs=1e-9)
        assert values[labels == label].std() == pytest.approx(1)
    assert real_statistics(measure).cuts.shape == (10, 2)
    # the words say most of what is measured, on the real digits
    assert 0.8 < np.corrcoef(found, values)[0, 1] < 0.95
