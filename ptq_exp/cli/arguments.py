"""The arguments of the command before Hydra composes them: short forms, folders, choices that are none."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from ptq_exp.errors import ConfigError
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import given, home_quoted, quoted, typed
from ptq_exp.storage.paths import with_home

_FOLDER_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")


def check_groups(arguments: list[str]) -> None:
    """Raise ConfigError for what Hydra would take: several options merged into one, settings in place of an option.

    Nor may an option be a path out of its group's folder.
    """
    asked = typed(arguments)
    for key, choices in given(asked.overrides, multirun=asked.multirun).items():
        for choice in choices:
            if key == "name" and "/" in str(choice):
                raise ConfigError(f"name={choice}: folders are called after it, give a name without /")
            folders = [folder / key for folder in _folders(asked)]
            if any(folder.is_dir() for folder in folders) and not _is_option(choice):
                options = ", ".join(sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))
                raise ConfigError(f"{key}={choice}: choose one of {options}; -m {key}=A,B runs one after another")


def _is_option(choice: Any) -> bool:
    """Whether a group's choice may be the name of a file; nested folders have a slash."""
    if not isinstance(choice, str):
        return False
    text = choice.strip()
    return bool(text) and text[0] not in "[{" and not {"", ".", ".."} & set(text.split("/"))


def spelt_out(arguments: list[str]) -> list[str]:
    """Rewrite `bits=[8]*100+[4]*150` (a bit schedule in place of a choice) and `~/path` in Hydra's grammar."""
    found = []
    for argument in arguments:
        widths = re.fullmatch(r"(\+*)bits(\.schedule)?=(\[[^'\"]*)", argument)
        if widths is None:
            found.append(home_quoted(argument))
            continue
        found += [] if widths[2] else [f"{widths[1]}bits=step_list"]
        found.append(f"bits.schedule='{widths[3]}'")
    return found


def with_saved_model(arguments: list[str]) -> list[str]:
    """Return the arguments with `model=` of the saved model that `quantized=PATH` names, where it is left out.

    Raises:
        PTQError: there is no saved model, or it does not say which model to build.
    """
    command = typed(arguments)
    asked = given(command.overrides, multirun=command.multirun)
    paths = [path for path in asked.get("quantized", ()) if path not in (None, "", "null")]
    evaluated = asked.get("experiment") == ["evaluate"]
    if not paths:
        if evaluated:
            raise ConfigError("+experiment=evaluate needs quantized=PATH: a run folder, or its sub-folder quantized")
        return arguments
    if not evaluated:
        raise ConfigError(f"quantized={paths[0]} is there to be evaluated: use +experiment=evaluate")
    if "model" in asked:
        return arguments
    from ptq_exp.deploy.artifact import Artifact  # torch takes seconds

    names = {Artifact.open(with_home(str(path), "quantized")).identity["name"] for path in paths}
    if len(names) > 1 or not any((folder / "model" / f"{min(names)}.yaml").exists() for folder in _folders(command)):
        raise ConfigError(f"quantized={paths[0]} holds {', '.join(sorted(names))}: give model=, one of conf/model")
    return [*arguments, f"model={quoted(min(names))}"]


def own_folder(command: Namespace) -> Path | None:
    """Return the folder that --config-dir names."""
    return None if command.config_dir is None else Path(command.config_dir)


def _folders(command: Namespace) -> list[Path]:
    """Return the folders of configuration files: the package's and, where there is one, the user's own."""
    own = own_folder(command)
    return [config_folder()] if own is None else [config_folder(), own]


def with_home_folders(arguments: list[str]) -> list[str]:
    """Write out `~` in the folders that Hydra's flags name; settings are expanded elsewhere."""
    found = list(arguments)
    for i, (before, word) in enumerate(zip(["", *arguments], arguments, strict=False)):
        flag, equals, folder = word.partition("=")
        if before in _FOLDER_FLAGS:
            found[i] = with_home(word, before)
        elif equals and flag in _FOLDER_FLAGS:
            found[i] = f"{flag}={with_home(folder, flag)}"
    return found
