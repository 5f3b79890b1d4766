"""pairs.npz: the scores of every pair of images of a run, and the full-precision images of the worst pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptq_exp.results.record import SAMPLES, read_samples
from ptq_exp.storage.npz import npz_arrays

FILE = "pairs.npz"
WORST = 12
"""Pairs of the lowest PSNR whose full-precision images are kept."""


@dataclass(frozen=True)
class WorstPair:
    """A pair of images uint8 [H, W, C] of one seed; `drawn_from` is its prompt or class, "" without either."""

    index: int
    psnr: float
    fp_image: np.ndarray
    image: np.ndarray
    drawn_from: str = ""


def worst_pairs(folder: Path) -> list[WorstPair]:
    """Read the worst pairs of the run in `folder`, the lowest PSNR first; none where it has not left them.

    Raises:
        DataError: a file is damaged.
    """
    if not (folder / FILE).is_file() or not (folder / SAMPLES).is_file():
        return []
    kept = npz_arrays(folder / FILE)
    images, labels = read_samples(folder / SAMPLES)
    prompts = kept.get("prompts")
    found = []
    for place, index in enumerate(kept["worst"].tolist()):
        text = "" if labels is None else f"class {labels[index]}"
        text = text if prompts is None else str(prompts[index])
        psnr = float(kept["psnr"][index])
        found.append(WorstPair(index, psnr, kept["worst_fp32"][place], np.asarray(images[index]), text))
    return found
