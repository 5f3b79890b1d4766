"""The command: `python -m ptq_exp +experiment=ndtc_w8a8`; without arguments it says what there is to choose from."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ptq_exp.cli.arguments import check_groups, own_folder, spelt_out, with_home_folders, with_saved_model
from ptq_exp.cli.commands import available, run_command
from ptq_exp.cli.failures import GATE_MISSED, cannot_write, refusal
from ptq_exp.cli.start import loaded, pause_collector, postpone_imports
from ptq_exp.cli.sweep.callback import end_of_sweep, interrupted_sweep
from ptq_exp.cli.sweep.resume import with_resumed_sweep
from ptq_exp.errors import (
    AGAIN,
    ConfigError,
    Interrupted,
    PTQError,
    end_interrupted,
    interruptible,
    nearest,
    reader_gone,
    start_command,
)
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.composition import unreadable, wrong_choice
from ptq_exp.settings.names import setting_names
from ptq_exp.settings.overrides import given, typed
from ptq_exp.settings.schema import SweepConfig

TRACEBACK = "HYDRA_FULL_ERROR"
_failures: list[str] = []
_missed: list[str] = []
_started = False  # whether Hydra has made the run folder and called the job


def _job(composed: DictConfig) -> float | tuple[float, ...] | None:
    """Run one composed experiment, see `run_job`."""
    global _started
    _started = True
    start_command()  # launchers have processes of their own
    postpone_imports()
    pause_collector()
    from ptq_exp.cli.sweep.job import run_job

    try:
        with interruptible():  # in the processes of a launcher, too
            objectives, missed = run_job(composed)
    except PTQError as error:
        if _traceback_wanted:
            raise
        return _failed(str(error))
    except Exception as error:
        refused = refusal(error, _run_folder())
        if _traceback_wanted or refused is None:
            raise
        return _failed(refused)
    finally:
        loaded()
    if missed:
        _missed.append(missed)
        print(missed, file=sys.stderr)
    return objectives


def _run_folder() -> str:
    """Return the run folder from Hydra, or from the command line if Hydra has not started."""
    if _started:  # before, Hydra may still hold what an earlier call in this process left
        return HydraConfig.get().runtime.output_dir
    asked = given(typed(sys.argv[1:]).overrides)
    folders = [asked[key][0] for key in ("hydra.run.dir", "hydra.sweep.dir") if key in asked]
    return str(folders[0]) if folders else "a new folder below runs"


def _failed(line: str) -> None:
    _failures.append(line)
    print(f"error: {line}", file=sys.stderr)


def _about_composition(error: Exception) -> bool:
    """Whether Hydra complains about the command line; it raises a bare ValueError for a group given a number."""
    ours = (HydraException, OmegaConfBaseException)
    return isinstance(error, ours) or str(error).startswith("Config group override")


def _composition_message(error: Exception) -> str:
    """Hydra's complaint about the command line in one line, with the nearest valid name."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (wrong := wrong_choice(error, typed(sys.argv[1:]).overrides)):
        return wrong
    if unset := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"{unset[1]}: is not set, but other settings are made of it: set it where its group or section is set"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        return f"{key}: no such setting; {nearest(key, _known_settings())}"
    return " ".join(text.split())


def _check_stray(arguments: list[str]) -> None:
    """Raise ConfigError for the first argument that is neither KEY=VALUE nor a flag nor the value of one."""
    for word in typed(arguments).overrides:
        if re.fullmatch(r"\w[\w.-]*", word):
            settings = _known_settings()
            if word in settings:
                raise ConfigError(f"{word}: give it a value, {word}=VALUE")
            raise ConfigError(
                f"{word}: neither a command nor KEY=VALUE; {nearest(word, [*available(), *settings])}"
            )


def _known_settings() -> list[str]:
    """Return every setting and group of the schema, dotted."""
    names = [*setting_names(), *(f"sweep.{entry.name}" for entry in fields(SweepConfig))]
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(one[:n]) for one in parts for n in range(1, len(one) + 1)))


def _done_elsewhere(arguments: list[str]) -> bool:
    """Do what the arguments ask for if it is no experiment; return whether it was none."""
    if not arguments:
        from ptq_exp.cli.overview import overview

        print(overview(available()))
    elif arguments[0] in available():
        sys.argv[0] = f"{Path(sys.argv[0]).name} {arguments[0]}"
        run_command(arguments[0], arguments[1:])
    elif {"--help", "-h"} & set(arguments):
        from ptq_exp.cli.overview import full_help

        command = typed(arguments)
        print(full_help(command.overrides, available(), own_folder(command)))
    else:
        return False
    return True


_traceback_wanted = os.environ.get(TRACEBACK) == "1"


def main() -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend, 3 for a missed gate."""
    try:
        with interruptible():
            _main()
    except Interrupted as error:
        end_interrupted(error, interrupted_sweep() or AGAIN)


def _main() -> None:
    global _started
    start_command()
    postpone_imports()
    _failures.clear()
    _missed.clear()
    _started = False
    # conf/hydra has files for launchers whose plugins have defaults of the same name: Hydra joins the two
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    sys.argv[1:] = spelt_out(sys.argv[1:])
    failed, missed, interrupted = [], [], False
    try:
        with _hydra_raises(), _errors_in_one_line():
            _do()
    except Interrupted:
        interrupted = True
        raise
    finally:
        failed, missed = ([], []) if interrupted else end_of_sweep()
    if _failures or failed:
        sys.exit(1)
    if _missed or missed:
        sys.exit(GATE_MISSED)


def _do() -> None:
    """Run another command than experiments, or compose the experiments and run them."""
    if _done_elsewhere(sys.argv[1:]):
        sys.stdout.flush()
        return
    _check_stray(sys.argv[1:])
    sys.argv[1:] = with_resumed_sweep(with_home_folders(sys.argv[1:]))
    check_groups(sys.argv[1:])
    sys.argv[1:] = with_saved_model(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_job)()


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise, so that its message fits in one line; a log file on a full disk is no second error."""
    before, logging_raises = os.environ.get(TRACEBACK), logging.raiseExceptions
    os.environ[TRACEBACK], logging.raiseExceptions = "1", _traceback_wanted
    try:
        yield
    finally:
        logging.raiseExceptions = logging_raises
        if before is None:
            del os.environ[TRACEBACK]
        else:
            os.environ[TRACEBACK] = before


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End with one line and exit code 1 for what the user can mend; errors of jobs are reported as they occur."""
    try:
        yield
    except PTQError as error:
        if _traceback_wanted:
            raise
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:  # some of them are OSErrors, too
        if _traceback_wanted:
            raise
        sys.exit(f"error: {_composition_message(error)}")
    except BrokenPipeError:
        reader_gone()
    except (YAMLError, UnicodeDecodeError) as error:  # of a configuration file
        if _traceback_wanted or _started:
            raise
        sys.exit(f"error: {unreadable(error, typed(sys.argv[1:]))}")
    except (OSError, ValueError) as error:
        broken = error if isinstance(error, OSError) else error.__cause__  # logging hides the file that it cannot open
        if _traceback_wanted or not (_about_composition(error) or (isinstance(broken, OSError) and not _started)):
            raise
        if isinstance(broken, OSError):
            sys.exit(f"error: {cannot_write(broken, _run_folder())}")
        sys.exit(f"error: {_composition_message(error)}")
