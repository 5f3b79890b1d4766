"""The command: `python -m ptq_exp +experiment=ndtc_w8a8`; without arguments it says what there is to choose from."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq_exp.cli.failures import cannot_write, refusal
from ptq_exp.config import config_folder, nearest
from ptq_exp.errors import AGAIN, ConfigError, Interrupted, PTQError, end_interrupted, interruptible, reader_gone
from ptq_exp.schema import ExperimentConfig, SweepConfig
from ptq_exp.sweep.callback import end_of_sweep, interrupted_sweep
from ptq_exp.sweep.resume import with_resumed_sweep

TRACEBACK = "HYDRA_FULL_ERROR"
COMMANDS = {
    "doctor": "ptq_exp.cli.doctor",
    "cache": "ptq_exp.cli.cache",
    "table": "ptq_exp.table",
    "search": "ptq_exp.search.__main__",
    "report": "ptq_exp.report",
}
"""First argument -> module whose `main` takes the others; without the module there is no such command."""
_failures: list[str] = []
_started = False  # whether Hydra has made the run folder and called the job


def _job(composed: DictConfig) -> float | tuple[float, ...] | None:
    """One composed experiment; see `run_job`."""
    global _started
    _started = True
    from ptq_exp.sweep.job import run_job

    try:
        with interruptible():  # in the processes of a launcher, too
            return run_job(composed)
    except PTQError as error:
        if _traceback_wanted:
            raise
        return _failed(str(error))
    except Exception as error:
        refused = refusal(error, _run_folder())
        if _traceback_wanted or refused is None:
            raise
        return _failed(refused)


def _run_folder() -> str:
    """Where Hydra puts the run; as it was asked to, before there is a run."""
    if _started:  # before, Hydra may still hold what an earlier call in this process left
        return HydraConfig.get().runtime.output_dir
    asked = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    return asked.get("hydra.run.dir") or asked.get("hydra.sweep.dir") or "a new folder below runs"


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
    if stray := _stray(sys.argv[1:]):
        return stray
    if wrong := _wrong_choice(sys.argv[1:]):
        return wrong
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        return f"{key}: no such setting; {nearest(key, _known_settings())}"
    return " ".join(text.split())


def _stray(arguments: list[str]) -> str | None:
    """What is wrong with the first argument that is neither KEY=VALUE nor a flag nor the value of one."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if re.fullmatch(r"\w[\w.-]*", word) and (not before.startswith("-") or before in ("-m", "--multirun")):
            settings = _known_settings()
            if word in settings:
                return f"{word}: give it a value, {word}=VALUE"
            return f"{word}: neither a command nor KEY=VALUE; {nearest(word, [*_commands(), *settings])}"
    return None


def _wrong_choice(overrides: list[str]) -> str | None:
    """The first `group=choice` on the command line whose choice has no file, with the choices that have one."""
    for override in overrides:
        group, _, choices = override.lstrip("+~").partition("=")
        options = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        for choice in choices.split(","):
            if group and options and choice not in options:
                return f"{group}={choice}: choose one of {', '.join(options)}"
    return None


def _check_groups(arguments: list[str]) -> None:
    """Raise ConfigError for what Hydra would take: several options merged into one, settings in place of an option."""
    for argument in arguments:
        group, equals, choice = argument.lstrip("+").partition("=")
        bare = choice.strip("'\" ")
        if group == "name" and "/" in bare:
            raise ConfigError(f"name={bare}: folders are called after it, give a name without /")
        if not equals or not group or not (config_folder() / group).is_dir():
            continue
        if not bare or bare[0] in "[{" or "/" in bare:
            options = ", ".join(sorted(path.stem for path in (config_folder() / group).glob("*.yaml")))
            raise ConfigError(f"{group}={choice}: choose one of {options}; -m {group}=A,B runs one after another")


def _known_settings() -> list[str]:
    """Every setting and group of the schema, dotted."""

    def walk(node, prefix: str):
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    container = OmegaConf.to_container(OmegaConf.structured(ExperimentConfig()))
    return [*walk(container, ""), *walk({"sweep": vars(SweepConfig())}, "")]


def _spelt_out(arguments: list[str]) -> list[str]:
    """`bits=[8]*100+[4]*150`, a bit schedule in place of a choice, in the words of Hydra's grammar."""
    found = []
    for argument in arguments:
        widths = re.fullmatch(r"(\+*)bits(\.schedule)?=(\[[^'\"]*)", argument)
        if widths is None:
            found.append(argument)
            continue
        found += [] if widths[2] else [f"{widths[1]}bits=step_list"]
        found.append(f"bits.schedule='{widths[3]}'")
    return found


def _with_saved_model(arguments: list[str]) -> list[str]:
    """The arguments with `model=` of the saved model that `quantized=PATH` names, where it is left out.

    Raises:
        PTQError: there is no saved model, or it does not say which model to build.
    """
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    paths, experiment = given.get("quantized", "null"), given.get("experiment", "")
    if paths in ("null", ""):
        if experiment == "evaluate":
            raise ConfigError("+experiment=evaluate needs quantized=PATH: a run folder, or its sub-folder quantized")
        return arguments
    if experiment != "evaluate":
        raise ConfigError(f"quantized={paths} is there to be evaluated: use +experiment=evaluate")
    from ptq_exp.artifact import Artifact  # torch takes seconds

    names = {Artifact.open(path.strip("'\"")).identity["name"] for path in paths.split(",")}
    if "model" in given:
        return arguments
    if len(names) > 1 or not (config_folder() / "model" / f"{min(names)}.yaml").exists():
        raise ConfigError(f"quantized={paths} holds {', '.join(sorted(names))}: give model=, one of conf/model")
    return [*arguments, f"model={min(names)}"]


def _commands() -> list[str]:
    return [name for name, module in COMMANDS.items() if find_spec(module)]


def _told(arguments: list[str]) -> bool:
    """Whether the arguments ask for something else than an experiment, which is done then."""
    if not arguments:
        from ptq_exp.cli.overview import overview

        print(overview(_commands()))
    elif arguments[0] in _commands():
        sys.argv[0] = f"{Path(sys.argv[0]).name} {arguments[0]}"
        import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    elif {"--help", "-h"} & set(arguments):
        from ptq_exp.cli.overview import full_help

        print(full_help([argument for argument in arguments if not argument.startswith("-")], _commands()))
    else:
        return False
    return True


_traceback_wanted = os.environ.get(TRACEBACK) == "1"


def main() -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    try:
        with interruptible():
            _main()
    except Interrupted as error:
        end_interrupted(error, interrupted_sweep() or AGAIN)


def _main() -> None:
    global _started
    _failures.clear()
    _started = False
    logging_raises = logging.raiseExceptions
    logging.raiseExceptions = _traceback_wanted  # a log file on a full disk is no second error
    # conf/hydra has files for launchers whose plugins have defaults of the same name: Hydra joins the two
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    sys.argv[1:] = _spelt_out(sys.argv[1:])
    before = os.environ.get(TRACEBACK)
    os.environ[TRACEBACK] = "1"  # let Hydra raise, so that what it says can be told in one line
    failed, interrupted = [], False
    try:
        if _told(sys.argv[1:]):
            sys.stdout.flush()
            return
        sys.argv[1:] = with_resumed_sweep(sys.argv[1:])
        _check_groups(sys.argv[1:])
        sys.argv[1:] = _with_saved_model(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_job)()
    except PTQError as error:  # of the command line; those of jobs are told as they occur
        if _traceback_wanted:
            raise
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:  # some of them are OSErrors, too
        if _traceback_wanted:
            raise
        sys.exit(f"error: {_composition_message(error)}")
    except Interrupted:
        interrupted = True
        raise
    except BrokenPipeError:
        reader_gone()
    except (OSError, ValueError) as error:
        broken = error if isinstance(error, OSError) else error.__cause__  # logging hides the file that it cannot open
        if _traceback_wanted or not (_about_composition(error) or (isinstance(broken, OSError) and not _started)):
            raise
        if isinstance(broken, OSError):
            sys.exit(f"error: {cannot_write(broken, _run_folder())}")
        sys.exit(f"error: {_composition_message(error)}")
    finally:
        logging.raiseExceptions = logging_raises
        if before is None:
            del os.environ[TRACEBACK]
        else:
            os.environ[TRACEBACK] = before
        failed = [] if interrupted else end_of_sweep()
    if _failures or failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
