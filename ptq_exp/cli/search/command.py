"""`python -m ptq_exp search bits=w4a8`: find the best combination of settings, stage by stage."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from ptq_exp.cli.search.coordinate import Search, Trial
from ptq_exp.cli.search.report import config_groups, experiment_file, markdown
from ptq_exp.cli.search.space import Space
from ptq_exp.cli.search.trials import run_trial, stop_trials
from ptq_exp.errors import AGAIN, ConfigError, command_line
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import given
from ptq_exp.storage.atomic import atomic_path
from ptq_exp.storage.paths import PathArgument, with_home
from ptq_exp.storage.plain_json import write_json

_HELP = """
A coordinate search: the stages of conf/search/SPACE.yaml are decided one after the other, each with the earlier
decisions in force; every trial is an ordinary run. The same command continues a search that was stopped: finished
trials are read again.

Leaves in the folder: search.json (all trials), search.md (their table), experiment.yaml (for conf/experiment).

examples:
  python -m ptq_exp search bits=w4a8
  python -m ptq_exp search bits=w4a4 model=digits_ldm --jobs 2
  python -m ptq_exp search bits=w8a8 --until placement
  python -m ptq_exp search bits=w6a6 --space my_space.yaml --folder runs/search/mine
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    with command_line(AGAIN):
        _search(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq_exp search", description=__doc__, epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    search = Search(
        space, lambda overrides: run_trial(folder, overrides), tuple(arguments.overrides), arguments.jobs, _say,
        stop_trials,
    )
    try:
        decided = search.best()
    finally:
        _leave(search.trials, folder)
    text = experiment_file(
        (*decided, f"bits={chosen['bits']}"), f"{path.stem}_${{bits.name}}",
        f"Found by: python -m ptq_exp search {shlex.join(arguments.overrides)}"
        f"{f' --until {arguments.until}' if arguments.until else ''}\n"
        f"({space.objective}, mean over seeds {', '.join(map(str, space.seeds))}).",
        config_groups(conf),
    )  # fmt: skip
    with atomic_path(folder / "experiment.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{markdown(search.trials)}\n\n{text}\nin {folder / 'experiment.yaml'}")


def _leave(trials: list[Trial], folder: Path) -> None:
    """Write what is known so far."""
    if not trials:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "search.json", [asdict(trial) for trial in trials])
    with atomic_path(folder / "search.md") as temporary:
        temporary.write_text(markdown(trials) + "\n", encoding="utf-8")


def _say(trial: Trial) -> None:
    numbers = ", ".join(f"{name} {trial.metrics[name]:.4g}" for name in ("psnr", "eps_error", "fid_increase_units")
                        if name in trial.metrics)  # fmt: skip
    print(f"{trial.stage}: {trial.candidate}: {numbers or 'failed: ' + trial.error}", flush=True)
