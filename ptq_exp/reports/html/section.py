"""`Section`: one part of a report, as `templates/report.html.j2` shows it, and the pictures in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
from matplotlib.figure import Figure

from ptq_exp.reports.html.page import data_uri
from ptq_exp.reports.html.table import Table

WIDE, NARROW = 9.0, 3.7
"""Inches; the narrow one is for windows below 640 pixels."""


@dataclass(frozen=True)
class Picture:
    """Addresses of one figure in two widths, for narrow and for wide windows, and what it shows in words."""

    narrow: str
    wide: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Image:
    """A picture of pixels as an address; `look`: "pixels" keeps them sharp, "fixed" keeps its text readable."""

    uri: str
    alt: str
    look: str = "pixels"
    caption: str = ""


@dataclass
class Section:
    """A heading and what stands under it, in this order; folded parts open on a click."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    gallery: list[Image] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded_tables: list[tuple[str, Table]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    folded_code: list[tuple[str, str]] = field(default_factory=list)


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
