"""README and docs are held against the package: rooms, pages, pictures, links."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FLOORS = runpy.run_path(str(ROOT / "tests" / "test_layering.py"))["FLOORS"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_architecture_names_every_room_on_its_floor():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert [(int(floor), room) for floor, room in rows] == [
        (number, room) for number, floor in enumerate(FLOORS, 1) for room in floor
    ]


def test_every_room_has_a_page_of_its_docstrings():
    rooms = {room for floor in FLOORS for room in floor if not room.startswith("__")}
    pages = {path.stem for path in (DOCS / "api").glob("*.md")} - {"README"}
    assert pages == rooms
    for room in rooms:
        assert f"::: ptq_exp.{room}\n" in (DOCS / "api" / f"{room}.md").read_text()


def test_the_site_leads_to_every_page():
    listed = []

    def collect(entry):
        if isinstance(entry, str):
            listed.append(entry)
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            collect(inner)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
        assert "://" in target or (page.parent / target).exists(), target


def test_anchors_are_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([\w-]+)\)", prose(page)):
            where = (page.parent / target).resolve() if target else page
            if where.parent.name == "api":  # made by mkdocstrings
                continue
            headings = re.findall(r"^#+ (.*)$", prose(where), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"
