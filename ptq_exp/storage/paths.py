"""Paths as people type them: `~` and `~user` stand for a home folder, wherever a path is taken."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ptq_exp.errors import ConfigError


def with_home(path: str, setting: str) -> str:
    """Expand a leading `~` or `~user` of `path`; other paths stay as they are (`./~` is a folder called `~`).

    Shells expand it only at the beginning of a word, and never between quotes.

    Raises:
        ConfigError: there is no such user, or no home folder; the message names `setting`.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path[1:].partition("/")[0]
        reason = f"there is no user {user}" if user else "the home folder is not known, HOME is not set"
        raise ConfigError(f"{setting}={path}: {reason}; write the path out, or ./{path} for a folder of that name")
    return expanded


def with_homes(value: Any, setting: str) -> Any:
    """Expand the texts and paths in `value`: one, or a dictionary or list of them, nested; see `with_home`."""
    if isinstance(value, dict):
        return {key: with_homes(inner, f"{setting}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [with_homes(inner, setting) for inner in value]
    if isinstance(value, os.PathLike) and str(value).startswith("~"):
        return Path(with_home(str(value), setting))
    return with_home(value, setting) if isinstance(value, str) else value


class PathArgument(argparse.Action):
    """Store an argument, or each of several, as a `Path` with its home folder written out.

    Raises:
        ConfigError: there is no such home folder.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:
        name = option_string or self.dest
        several = isinstance(values, list)
        paths = [Path(with_home(str(value), name)) for value in (values if several else [values])]
        setattr(namespace, self.dest, paths if several else paths[0])
