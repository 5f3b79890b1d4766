"""grid.png: the grid itself, beside it one label per row."""

import numpy as np
from PIL import Image

from ptq_exp.evaluation import image_grid
from ptq_exp.reports.grid import save_grid


def images(count, level):
    return np.full((count, 16, 16, 1), level, np.uint8)


def test_the_grid_stands_right_of_the_labels(tmp_path):
    fp, q = images(5, 60), images(5, 90)
    save_grid(tmp_path / "grid.png", fp, q, labels=("FP32", "W8A8"), columns=3)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    grid = image_grid(fp, q, columns=3)
    margin = picture.shape[1] - grid.shape[1]
    assert np.array_equal(picture[:, margin:], grid)
    rows = np.array_split(picture[:, :margin], 4)
    ink = [(row < 128).sum() for row in rows]
    assert min(ink) > 100  # a label in the margin of each of the rows FP, Q, FP, Q
    assert not np.array_equal(rows[0], rows[1])
