"""Words of the embedded pipelines' prompts: "a thick slanted seven" asks for a digit, a stroke width and a slant.

Both attributes have three levels, -1, 0 and 1: the lower, middle and upper third of the real digits of that class
(`ptq_exp.embedded.attributes`). A prompt without a word for the slant leaves it open.
"""

from __future__ import annotations

from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTHS = {-1: "thin", 0: "", 1: "thick"}
"""Level of the stroke width -> word; no word is the middle."""
SLANTS = {-1: "left-slanted", 0: "upright", 1: "slanted"}
"""Level of the slant -> word."""
LEVELS = (-1, 0, 1)


class Asked(NamedTuple):
    """What a prompt asks for: `digit` 0..9, the levels `width` and `slant`; None = the prompt leaves the slant open."""

    digit: int
    width: int
    slant: int | None


HELD_OUT = frozenset(Asked(digit, LEVELS[digit % 3], LEVELS[(digit + digit // 3) % 3]) for digit in range(10))
"""Combinations, one of each digit, whose images no training saw."""


def prompt(digit: int, width: int = 0, slant: int | None = None) -> str:
    """Write the prompt of a digit 0..9 and the levels -1, 0 or 1 of its stroke width and slant (None = any slant).

    Raises:
        KeyError, IndexError: no such digit or level.
    """
    words = [word for word in (WIDTHS[width], "" if slant is None else SLANTS[slant], DIGITS[digit]) if word]
    return " ".join(["an" if words[0][0] in "aeiu" else "a", *words])


def asked(text: str) -> Asked | None:
    """Read what a prompt asks for; None for a text that does not name exactly one digit and one level of each."""
    words = text.lower().split()
    digits = [DIGITS.index(word) for word in words if word in DIGITS]
    widths = [level for level, word in WIDTHS.items() if word and word in words]
    slants = [level for level, word in SLANTS.items() if word in words]
    if len(digits) != 1 or len(widths) > 1 or len(slants) > 1:
        return None
    return Asked(digits[0], widths[0] if widths else 0, slants[0] if slants else None)


def evaluation_prompts(n: int) -> list[str]:
    """List the prompts of images 0..n-1: image i gets digit i mod 10, and 90 images get every combination once."""
    cells = [(width, slant) for width in LEVELS for slant in LEVELS]
    return [prompt(i % 10, *cells[(i // 10 + i % 10) % len(cells)]) for i in range(n)]


def training_words() -> list[str]:
    """List every word of the prompts once: the vocabulary."""
    texts = [*DIGITS, *WIDTHS.values(), *SLANTS.values(), "a", "an"]
    return sorted({word for text in texts for word in text.replace("-", " ").split()})
