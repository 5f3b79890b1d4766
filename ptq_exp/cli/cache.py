"""`python -m ptq_exp cache ls | prune`: what runs share on disk, and making room."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ptq_exp.cli.commands import parser_of
from ptq_exp.errors import PTQError, command_line
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import unquoted
from ptq_exp.storage.entries import HALF_WRITTEN, PARTS, Entry, entries, total
from ptq_exp.storage.paths import PathArgument
from ptq_exp.storage.prune import Limits, chosen, held, remove

_HELP = f"""
An entry is computed once and reused by every run with the same settings: calibration sets, ranges, full-precision
images, features. The kind {PARTS} holds the pieces of runs that were killed, which the next run continues.
Removing an entry costs the time to compute it again, nothing else. Entries that a live process computes stay.

examples:
  python -m ptq_exp cache ls
  python -m ptq_exp cache prune                             damaged and half-written entries alone
  python -m ptq_exp cache prune --older-than 30 --dry-run
  python -m ptq_exp cache prune --max-size 20 cache_dir=/data/cache
"""


def default_folder() -> Path:
    """`cache_dir` as `conf/config.yaml` sets it."""
    return Path(OmegaConf.load(config_folder() / "config.yaml").cache_dir)


def main(argv: Sequence[str]) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    with command_line():
        arguments = _parser().parse_args(with_plain_options(argv))
        root = arguments.cache_dir or default_folder()
        if root.exists() and not root.is_dir():
            raise PTQError(f"cache_dir={root} is no folder")
        if arguments.action == "ls":
            print(listing(root, entries(root, verify=arguments.verify), arguments.totals))
        else:
            limits = Limits(
                arguments.older_than, None if arguments.max_size is None else arguments.max_size * 1e9, arguments.all
            )
            prune(root, limits, dry_run=arguments.dry_run)


def with_plain_options(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `cache_dir=PATH`, as experiments have it, as a flag; quotes for Hydra may stay."""
    key = "cache_dir="
    return [f"--cache-dir={unquoted(word.removeprefix(key))}" if word.startswith(key) else word for word in argv]


def listing(root: Path, found: Sequence[Entry], totals_only: bool = False) -> str:
    """Return a line per entry, a line per kind, and the total."""
    if not found:
        return f"{root} is empty"
    rows = []
    if not totals_only:
        rows = [("kind", "entry", "size", "made", "last use", ""), *map(_row, found), ("",) * 6]
    rows += [("kind", "entries", "size", "made", "last use", "")]
    for kind in sorted({entry.kind for entry in found}):
        rows.append(_summary(kind, [entry for entry in found if entry.kind == kind]))
    rows.append(_summary("total", found))
    return _aligned(rows)


def prune(root: Path, limits: Limits, *, dry_run: bool = False) -> None:
    """Remove what is damaged, half-written or beyond the limits, and say so entry by entry.

    Raises:
        PTQError: the folder cannot be read, or an entry cannot be removed.
    """
    found = entries(root, verify=True)
    gone = []
    for entry, reason in chosen(found, limits, lambda entry: held(root, entry)):
        if held(root, entry) if dry_run else not remove(root, entry):
            print(f"kept {_label(entry)}: a live process holds its lock")
            continue
        gone.append(entry)
        print(f"{'would remove' if dry_run else 'removed'} {_label(entry)}, {size_text(entry.size)}: {reason}")
    left = total(found) - total(gone)
    said = "would be freed" if dry_run else "freed"
    print(f"{len(gone)} of {len(found)} entries, {size_text(total(gone))} {said}; {size_text(left)} left in {root}")


def size_text(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def age_text(seconds: float) -> str:
    """How long ago, in the unit that suits it."""
    for unit, length in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < length:
            return f"{max(seconds, 0):.0f} {unit}"
        seconds /= 24 if unit == "h" else 60
    return f"{seconds:.0f} d"


def _label(entry: Entry) -> str:
    name = entry.path.name if entry.problem == HALF_WRITTEN else entry.path.name[:12]
    return f"{entry.kind}/{name}"


def _row(entry: Entry) -> tuple[str, ...]:
    now = time.time()
    ages = age_text(now - entry.made), age_text(now - entry.used)
    return entry.kind, _label(entry).partition("/")[2], size_text(entry.size), *ages, entry.problem or ""


def _summary(kind: str, found: Sequence[Entry]) -> tuple[str, ...]:
    now = time.time()
    ages = age_text(now - min(entry.made for entry in found)), age_text(now - max(entry.used for entry in found))
    useless = sum(entry.problem is not None for entry in found)
    note = f"{useless} of no use: cache prune" if useless else ""
    return kind, str(len(found)), size_text(total(found)), *ages, note


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("cache", __doc__, _HELP)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls | prune")
    show = actions.add_parser("ls", help="list entries and totals")
    show.add_argument("--totals", action="store_true", help="a line per kind alone")
    show.add_argument("--verify", action="store_true", help="compare checksums, which reads every file")
    clear = actions.add_parser("prune", help="remove damaged and half-written entries, and what the options say")
    clear.add_argument("--older-than", type=_number, metavar="DAYS", help="entries not used for this long")
    clear.add_argument("--max-size", type=_number, metavar="GB", help="the least recently used ones beyond this size")
    clear.add_argument("--all", action="store_true", help="everything")
    clear.add_argument("--dry-run", action="store_true", help="only say what would go")
    for action in (show, clear):
        default = "default: cache_dir of conf/config.yaml"
        action.add_argument("--cache-dir", action=PathArgument, metavar="PATH", help=default)
    return parser
