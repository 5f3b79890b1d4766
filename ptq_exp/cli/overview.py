"""What there is to choose from, read from the comments of `conf/`: printed without loading torch."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq_exp.cli.commands import COMMANDS
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import quoted

_PACKAGE = "# @package"
TITLE = "ptq_exp: post-training quantization of diffusion models"
EXAMPLES = """\
  python -m ptq_exp +experiment=ndtc_w8a8                  one experiment
  python -m ptq_exp +experiment=ndtc_w8a8 metric=lp        one group exchanged
  python -m ptq_exp -m bits=w8a8,w4a8 seed=0,1,2           a sweep
"""
OTHERS = ("hydra", "search", "table")
"""Folders of `conf/` that are no groups of an experiment."""


def groups() -> dict[str, list[Path]]:
    """Return the files of each configuration group of an experiment; groups and files in alphabetical order."""
    folders = sorted(path for path in config_folder().iterdir() if path.is_dir() and path.name not in OTHERS)
    found = {folder.name: sorted(folder.glob("*.yaml")) for folder in folders}
    return {group: files for group, files in found.items() if files}


def comment(path: Path) -> str:
    """Return the first sentence of the comment that a configuration file begins with; "" without one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and lines[0].startswith(_PACKAGE):
        lines = lines[1:]
    block = []
    for line in lines:
        if not line.startswith("#"):
            break
        block.append(line.lstrip("# ").strip())
    text = " ".join(block)
    sentence = re.match(r"(.*?\.)\s+[A-Z`]", text)
    return (sentence[1] if sentence else text).rstrip(".:")


def overview(commands: Sequence[str] = tuple(COMMANDS)) -> str:
    """Return what the command prints without arguments: experiments, groups, three examples, `commands`."""
    found = groups()
    names = [f"  {group:<15} {', '.join(file.stem for file in files)}" for group, files in found.items()]
    return "\n".join([
        TITLE, "", "Experiments (+experiment=NAME)", *_options(found.get("experiment", [])), "",
        "Groups (GROUP=OPTION)", *(line for line in names if not line.startswith("  experiment ")), "",
        "Examples", EXAMPLES, "Commands (python -m ptq_exp COMMAND --help)",
        *(f"  {name:<15} {COMMANDS[name]}" for name in commands), "",
        "--help says what every option is, and lists the settings.",
    ])


def full_help(
    overrides: Sequence[str] = (), commands: Sequence[str] = tuple(COMMANDS), own: Path | None = None
) -> str:
    """Return the text of `--help`: every group and option with one line, and the settings as `overrides` compose them.

    Args:
        own: a folder with configuration files of one's own, which may be chosen, too.

    Raises:
        HydraException, OmegaConfBaseException: the overrides cannot be composed.
    """
    lines = [TITLE, "", EXAMPLES, "Commands (python -m ptq_exp COMMAND --help)"]
    lines += [f"  {name:<24} {COMMANDS[name]}" for name in commands]
    lines += ["", "Groups and their options (GROUP=OPTION, experiments with a plus: +experiment=OPTION)"]
    for group, files in groups().items():
        lines += ["", group, *_options(files)]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        found = [] if own is None else [f"hydra.searchpath=[{quoted(f'file://{own.absolute()}')}]"]
        settings = OmegaConf.to_yaml(compose("config", overrides=[*found, *overrides]))
    lines += ["", "Settings (any can be overridden, KEY.SUBKEY=VALUE)", "", settings]
    lines += [
        "HYDRA_FULL_ERROR=1 shows the traceback of an error.",
        "--hydra-help shows the flags of Hydra itself, --cfg job prints the composed settings.",
        'eval "$(ptq-exp -sc install=bash)" completes groups and options of ptq-exp with the tabulator key.',
    ]
    return "\n".join(lines)


def _options(files: Sequence[Path]) -> Iterator[str]:
    """One line per file, cut at the width of a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for file in files:
        line = f"  {file.stem:<24} {comment(file)}"
        yield f"{line[: width - 1]}…" if 40 < width < len(line) else line
