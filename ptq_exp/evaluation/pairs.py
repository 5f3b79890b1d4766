"""`Pairs`: images of the quantized model beside those of full precision, and what is computed pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ptq_exp.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to load, and is not needed to read a table of scores
    from ptq_exp.evaluation.image_text import ImageText
    from ptq_exp.evaluation.perceptual import Perceptual

_BATCH = 64
WHITE = 255


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images drawn from the same noise by two models.

    Attributes:
        images, fp_images: uint8 [N, H, W, C]; image i of both has the same seed, prompt and class.
        prompts: what the images were drawn from; None = no prompts.
        perceptual: computes LPIPS; None = it is not measured.
        image_text: computes the CLIP score; None = it is not measured.
    """

    images: np.ndarray
    fp_images: np.ndarray
    prompts: Sequence[str] | None = None
    perceptual: Perceptual | None = None
    image_text: ImageText | None = None

    @property
    def of_full_precision(self) -> Pairs:
        """The full-precision images in place of those of the quantized model."""
        return replace(self, images=self.fp_images)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the images of both models, a few at a time: they may be mapped from files larger than the memory."""
        for start in range(0, len(self.images), _BATCH):
            yield self.images[start : start + _BATCH], self.fp_images[start : start + _BATCH]


def psnr_values(pairs: Pairs) -> np.ndarray:
    """Compute the PSNR of each pair in dB [N], identical pairs at the cap."""
    from ptq_exp.evaluation.images import capped_psnr

    return capped_psnr(pairs.fp_images, pairs.images)


def ssim_values(pairs: Pairs) -> np.ndarray:
    """Compute the SSIM of each pair [N]."""
    from ptq_exp.evaluation.similarity import ssim

    planes = ((np.moveaxis(a, 3, 1), np.moveaxis(b, 3, 1)) for a, b in pairs.batches())
    return np.concatenate([ssim(a, b, WHITE) for a, b in planes])


def lpips_values(pairs: Pairs) -> np.ndarray:
    """Compute LPIPS of each pair [N].

    Raises:
        DataError: there is nothing that computes it.
    """
    if pairs.perceptual is None:
        raise DataError("no LPIPS without the weights of its trunk: set evaluation.lpips=PATH")
    return np.concatenate([pairs.perceptual(a, b) for a, b in pairs.batches()])


def clip_scores(pairs: Pairs) -> np.ndarray:
    """Compute the CLIP score of each image and its prompt [N].

    Raises:
        DataError: there is nothing that computes it, or there are no prompts.
    """
    if pairs.image_text is None or pairs.prompts is None:
        raise DataError("no CLIP score without a CLIP model and prompts: set evaluation.clip=PATH, draw from prompts")
    return pairs.image_text(pairs.images, pairs.prompts)
