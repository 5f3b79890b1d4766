"""`Section`: one part of a report, as `templates/report.html.j2` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptq_exp.reports.html.picture import Picture
from ptq_exp.reports.html.table import Table


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
