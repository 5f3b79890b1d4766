"""The commands beside the experiment itself: `python -m ptq_exp COMMAND`."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

COMMANDS = {
    "doctor": "checks Python, packages, devices, disk space, weights",
    "cache": "cache ls | prune: what runs share on disk",
    "table": "a table of many runs; --list: layouts, one of conf/table each",
    "bench": "times of a saved model on engines, beside full precision and the simulation",
    "search": "the best combination of settings at given bits, stage by stage as conf/search says",
    "report": "a report of many runs",
    "export": "a saved quantized model as a file for OpenVINO or ONNX Runtime",
    "train_embedded": "train an embedded network again",
}
"""First argument of the command line -> what it does."""


def parser_of(name: str, about: str | None, examples: str) -> argparse.ArgumentParser:
    """Make the parser of a command; its texts keep their lines."""
    return argparse.ArgumentParser(
        prog=f"python -m ptq_exp {name}", description=about, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(name: str, arguments: list[str]) -> None:
    """Call `main` of the module of a command of `COMMANDS`."""
    import_module(f"ptq_exp.cli.{name}").main(arguments)


def available() -> list[str]:
    """Return the commands whose modules are installed."""
    return [name for name in COMMANDS if find_spec(f"ptq_exp.cli.{name}")]
