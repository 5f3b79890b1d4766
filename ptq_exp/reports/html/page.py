"""One HTML page that needs nothing but itself: templates, pictures as data URIs, and no way to load anything else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ptq_exp.storage.atomic import atomic_path

NAME = "report.html"
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def write_page(folder: Path, **values: Any) -> Path:
    """Render the template of reports with `values`, all text escaped, to report.html in `folder`, atomically.

    Raises:
        PTQError: the file cannot be written.
    """
    page = _templates().get_template("report.html.j2").render(**values)
    path = folder / NAME
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def data_uri(content: bytes, suffix: str) -> str:
    """`content` of a .png or .svg file as the address of a picture."""
    return f"data:{_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str | None:
    """Return a picture file as an address that holds it; None where there is no such file."""
    return data_uri(path.read_bytes(), path.suffix) if path.is_file() else None


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("ptq_exp.reports.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        # the browser itself sees to it that the page loads nothing and runs no other script
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    }
    return environment
