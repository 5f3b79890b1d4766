"""Figures in a page: SVG, each drawn twice, for narrow and for wide windows."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from ptq_exp.reports.html.page import data_uri

WIDE, NARROW = 9.0, 3.7
"""Inches; the narrow one is for windows below 640 pixels."""


@dataclass(frozen=True)
class Picture:
    """Addresses of one figure in two widths, and what it shows in words."""

    narrow: str
    wide: str
    alt: str
    caption: str = ""


def drawn(draw: Callable[[float], Figure], alt: str, caption: str = "") -> Picture:
    """Return the figure that `draw` makes of a width in inches, as a `Picture`."""
    narrow, wide = (_svg(draw(width)) for width in (NARROW, WIDE))
    return Picture(narrow, wide, alt, caption)


def _svg(figure: Figure) -> str:
    """Return the figure as a data URI; the same figure gives the same text."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ptq-exp"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return data_uri(stream.getvalue(), ".svg")
