"""grid.png: full-precision images over quantized images of the same seeds, with readable row labels."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ptq_exp.evaluation.images import image_grid
from ptq_exp.storage.atomic import atomic_path

_FONT_SIZE = 18
_MARGIN = 8


def save_grid(
    path: str | os.PathLike,
    fp_images: np.ndarray,
    q_images: np.ndarray,
    *,
    labels: tuple[str, str],
    columns: int = 8,
) -> None:
    """Write the picture of `image_grid` as PNG, its rows labelled in turn with the two `labels`.

    Args:
        path: the .png file, written atomically.
        fp_images, q_images: uint8 [N, H, W, 1 or 3], image i of both from the same seed.
        labels: for the full-precision and the quantized rows, such as ("FP32", "W8A8").
        columns: images per row.

    Raises:
        DataError: images as `image_grid` refuses them.
        PTQError: the file cannot be written.
    """
    grid = image_grid(fp_images, q_images, columns)
    rows = 2 * -(-len(fp_images) // min(columns, len(fp_images)))
    font = ImageFont.load_default(size=_FONT_SIZE)
    margin = 2 * _MARGIN + int(max(font.getlength(label) for label in labels))
    picture = Image.new("RGB", (margin + grid.shape[1], grid.shape[0]), "white")
    picture.paste(Image.fromarray(grid), (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row in range(rows):
        middle = (row + 0.5) * grid.shape[0] / rows
        draw.text((margin - _MARGIN, middle), labels[row % 2], fill="black", font=font, anchor="rm")
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
