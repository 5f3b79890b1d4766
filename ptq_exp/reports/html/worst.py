"""The section of a report that shows the worst pairs of images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from ptq_exp.reports.html.page import data_uri
from ptq_exp.reports.html.section import Image, Section
from ptq_exp.results.worst_pairs import WorstPair, worst_pairs


def worst_section(results: Mapping[str, Any], folder: Path) -> Section | None:
    """Return the pairs of the lowest PSNR, the worst first; None where the run has not left any."""
    pairs = worst_pairs(folder)
    if not pairs:
        return None
    bits = results["config"]["bits"]["name"].upper()
    text = (f"Left full precision, right {bits}, from the same noise: the {len(pairs)} pairs of the lowest PSNR of "
            f"{results['metric_spec']['n_samples']}, the worst first.")
    return Section("worst-pairs", "Worst pairs", text=[text], gallery=[_image(pair, bits) for pair in pairs])


def _image(pair: WorstPair, bits: str) -> Image:
    from ptq_exp.evaluation.images import side_by_side  # loads torch: other reports do without

    stream = io.BytesIO()
    Picture.fromarray(side_by_side(pair.fp_image, pair.image)).save(stream, format="PNG")
    drawn_from = f"{pair.drawn_from}, " if pair.drawn_from else ""
    alt = f"Image {pair.index} in full precision and in {bits}"
    return Image(data_uri(stream.getvalue(), ".png"), alt,
                 caption=f"{drawn_from}image {pair.index}: PSNR {_decibels(pair.psnr)}")


def _decibels(psnr: float) -> str:
    return f"{psnr:.1f} dB" if np.isfinite(psnr) else "infinite"
