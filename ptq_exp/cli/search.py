"""`python -m ptq_exp search bits=w4a8`: find the best combination of settings, stage by stage."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ptq_exp.cli.commands import parser_of
from ptq_exp.cli.coordinate_search import Search, merged
from ptq_exp.cli.search_pairs import with_pairs
from ptq_exp.cli.search_space import Space, Trial
from ptq_exp.errors import AGAIN, ConfigError, DataError, command_line
from ptq_exp.evaluation.scores import HEADLINE, shown
from ptq_exp.reports.tables.notation import to_markdown
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import given, quoted
from ptq_exp.storage.atomic import atomic_path
from ptq_exp.storage.paths import PathArgument, with_home
from ptq_exp.storage.plain_json import read_json, write_json

_HELP = """
A coordinate search: the stages of conf/search/SPACE.yaml are decided one after the other, each with the earlier
decisions in force; every trial is an ordinary run. A later candidate replaces an earlier one where the 95 % interval of
its gain, by a paired bootstrap over images, lies above 0; `tolerance` asks for more. Under `require` a space has least
values of numbers in results.json: a trial with less cannot win. The same command continues a search that was stopped:
finished trials are read again.

Leaves in the folder: search.json (all trials), search.md (their table), experiment.yaml (for conf/experiment).

examples:
  python -m ptq_exp search bits=w4a8
  python -m ptq_exp search bits=w4a4 model=digits_ldm --jobs 2
  python -m ptq_exp search bits=w8a8 --until placement
  python -m ptq_exp search bits=w8a8 --space deploy
  python -m ptq_exp search bits=w6a6 --space my_space.yaml --folder runs/search/mine
"""
_METHOD = ("calibration", "metric", "quantization", "reconstruction", "correction")
"""Groups whose settings are part of what is found, also where all trials share them; others say how it is measured."""
_running: set[subprocess.Popen] = set()


def main(argv: list[str] | None = None) -> None:
    """Search; exit code 1 and one line on standard error for anything the user can mend."""
    with command_line(AGAIN):
        _search(_parser().parse_intermixed_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("search", __doc__, _HELP)
    parser.add_argument("overrides", nargs="+", help="settings of all trials, bits= among them")
    parser.add_argument("--space", default="best", help="name in conf/search, or a YAML file (best)")
    parser.add_argument("--until", help="the last stage to decide (all)")
    parser.add_argument("--folder", action=PathArgument, help="where it is left (runs/search/<space>_<bits>[_<model>])")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, one thread each (1)")
    return parser


def _search(arguments: argparse.Namespace) -> None:
    chosen = {key: str(values[0]) for key, values in given(arguments.overrides).items()}
    if "bits" not in chosen:
        raise ConfigError("no bits among the settings: add one, such as bits=w4a8")
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs={arguments.jobs}: choose 1 or more")
    conf = config_folder()
    named = with_home(arguments.space, "--space")
    path = Path(named) if named.endswith(".yaml") else conf / "search" / f"{named}.yaml"
    space = Space.load(path)
    if arguments.until:
        space = space.until(arguments.until)
    names = [path.stem, *(chosen[key] for key in ("bits", "model") if key in chosen)]
    folder = arguments.folder or Path("runs/search") / "_".join(names)
    fixed = tuple(arguments.overrides)
    search = Search(space, lambda run: run_trial(folder, run), fixed, arguments.jobs, _print_trial, stop_trials)
    try:
        decided = search.best()
    finally:
        _write_trials(search.trials, folder)
    comment = (
        f"Found by: python -m ptq_exp search {shlex.join(arguments.overrides)}"
        f"{f' --space {arguments.space}' if arguments.space != 'best' else ''}"
        f"{f' --until {arguments.until}' if arguments.until else ''}\n"
        f"({space.objective}, mean over seeds {', '.join(map(str, space.seeds))})."
    )
    groups = sorted(place.name for place in conf.iterdir() if place.is_dir())
    shared = [one for one in (*space.base, *fixed) if one.partition("=")[0].partition(".")[0] in _METHOD]
    decided = (*merged(shared, decided), f"bits={chosen['bits']}")
    text = experiment_file(decided, f"{path.stem}_${{bits.name}}", comment, groups)
    with atomic_path(folder / "experiment.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{markdown(search.trials)}\n\n{text}\nin {folder / 'experiment.yaml'}")


def _write_trials(trials: list[Trial], folder: Path) -> None:
    if not trials:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "search.json", [trial.to_dict() for trial in trials])
    with atomic_path(folder / "search.md") as temporary:
        temporary.write_text(markdown(trials) + "\n", encoding="utf-8")


def _print_trial(trial: Trial) -> None:
    names = [name for name in ("psnr", "eps_error", "fid_increase_units") if name in trial.metrics]
    numbers = ", ".join(f"{name} {trial.metrics[name]:.4g}" for name in names)
    said = [numbers] * bool(numbers) + [f"{'cannot win' if numbers else 'failed'}: {trial.error}"] * bool(trial.error)
    print(f"{trial.stage}: {trial.candidate}: {'; '.join(said)}", flush=True)


def run_trial(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the command with `overrides` in a process of its own, unless that run has finished before.

    Returns:
        Its results.json, with the scores of every image; for a run that failed {"error": text}.
    """
    place = folder / "trials" / hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:16]
    if (found := _finished(place)) is not None:
        return with_pairs(found, place)
    place.mkdir(parents=True, exist_ok=True)
    ours = [f"hydra.run.dir={quoted(str(place))}", "trainer.progress_bar=false"]
    command = [sys.executable, "-m", "ptq_exp", *overrides, *ours]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
    with (place / "output.txt").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _running.add(process)
        code = process.wait()
        _running.discard(process)
    if (found := _finished(place)) is not None:
        return with_pairs(found, place)
    lines = (place / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"error": lines[-1].removeprefix("error: ") if lines else f"ended with code {code}"}


def stop_trials() -> None:
    """End the runs that are under way; what they have drawn stays for the next time."""
    for process in list(_running):
        process.terminate()


def _finished(place: Path) -> dict[str, Any] | None:
    try:
        found = read_json(place / "results.json")
    except DataError:
        return None
    return found if found.get("status") == "finished" else None


def markdown(trials: Sequence[Trial]) -> str:
    """Return a table, one row per trial, in the order of the stages; what was chosen is marked."""
    compared = any(trial.gain is not None for trial in trials)
    measured = [name for name in shown(HEADLINE) if any(name in trial.metrics for trial in trials)]
    rows = [
        {"stage": trial.stage, "candidate": trial.candidate}
        | {name: trial.metrics.get(name) for name in measured}
        | ({"gain": _interval(trial)} if compared else {})
        | {"": "chosen" if trial.chosen else trial.error}
        for trial in trials
    ]
    return to_markdown(pd.DataFrame(rows), digits=4)


def _interval(trial: Trial) -> str:
    return "" if trial.gain is None else f"[{trial.gain[0]:+.3g}, {trial.gain[1]:+.3g}]"


def experiment_file(decided: Sequence[str], name: str, comment: str, groups: Sequence[str]) -> str:
    """Return the text of a file for conf/experiment with the overrides `decided`.

    Args:
        name: of the runs.
        comment: first lines; without the mark of a comment.
        groups: names of configuration groups: their overrides choose a file, all others set a value.
    """
    pairs = [override.partition("=")[::2] for override in decided]
    defaults = [{f"override /{key}": value} for key, value in pairs if key in groups]
    body: dict[str, Any] = {"defaults": defaults} if defaults else {}
    body["name"] = name
    for key, value in pairs:
        if key not in groups:
            *path, last = key.split(".")
            node = body
            for part in path:
                node = node.setdefault(part, {})
            node[last] = yaml.safe_load(value)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return f"# @package _global_\n{head}{yaml.safe_dump(body, sort_keys=False, allow_unicode=True)}"
