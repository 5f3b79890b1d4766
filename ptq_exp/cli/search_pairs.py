"""Compare trials of a search image by image: how much better one is, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.evaluation.bootstrap import Interval, paired_bootstrap
from ptq_exp.results.worst_pairs import FILE
from ptq_exp.storage.npz import npz_arrays

PAIRS = "pairs"
"""Beside the entries of results.json: values of every image by score, and what images were drawn from."""
PROMPTS = "prompts"


@dataclass(frozen=True, eq=False)
class Images:
    """A score of every image of a trial, its seeds one after the other.

    Attributes:
        values: [N].
        prompts: what each image was drawn from; None = no prompts.
    """

    values: np.ndarray
    prompts: tuple[str, ...] | None = None

    def gain(self, than: Images, sign: int) -> Interval | None:
        """Return the interval of the mean of `sign` * (own values - those of another); None: not the same images."""
        if len(self.values) != len(than.values) or self.prompts != than.prompts:
            return None
        return paired_bootstrap(sign * self.values, sign * than.values, prompts=self.prompts)


def images_of(score: str, results: Sequence[Mapping[str, Any]]) -> Images | None:
    """Return a score of all images of a trial's runs, one for each seed; None where it is none of single images."""
    found = [result.get(PAIRS, {}) for result in results]
    if not found or any(score not in pairs for pairs in found):
        return None
    values = np.concatenate([np.asarray(pairs[score], float) for pairs in found])
    if not all(PROMPTS in pairs for pairs in found):
        return Images(values)
    return Images(values, tuple(str(prompt) for pairs in found for prompt in pairs[PROMPTS]))


def with_pairs(found: dict[str, Any], place: Path) -> dict[str, Any]:
    """Add to the content of results.json what the run in `place` says of every image, if anything.

    Raises:
        DataError: its file is damaged.
    """
    if not (place / FILE).is_file():
        return found
    arrays = npz_arrays(place / FILE)
    return found | {PAIRS: {name: np.array(array) for name, array in arrays.items() if not name.startswith("worst")}}
