"""Read what was typed: overrides as Hydra's own parser reads them, and how to type what that parser refuses."""

from __future__ import annotations

import re
import shlex
import typing
from argparse import Namespace
from collections.abc import Sequence
from types import UnionType
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from ptq_exp.errors import ConfigError, nearest, one_line
from ptq_exp.settings.names import setting_types

_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "sweep.resume")
"""Texts that are no setting of an experiment."""
_FOR_SHELL = '"$`\\!'
"""Characters with a meaning between double quotes of a shell."""


def typed(arguments: Sequence[str]) -> Namespace:
    """Parse the arguments as Hydra does: `overrides`, `config_dir`, `multirun`, ..."""
    return get_args_parser().parse_args(list(arguments))


def flags(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the overrides: flags with their values."""
    overrides = typed(arguments).overrides
    n, found = len(overrides), list(arguments)
    start = next((i for i in reversed(range(len(found) - n + 1)) if found[i : i + n] == overrides), 0)
    return found[:start] + found[start + n :]


def parsed(overrides: Sequence[str], *, multirun: bool = False) -> list[Override]:
    """Parse the overrides as Hydra does.

    Raises:
        ConfigError: it refuses one, or reads something else than text in a text; the message says what to type.
    """
    return [_parsed(override, multirun) for override in overrides]


def values(override: Override) -> list[Any]:
    """Return what a setting is given: one value, or those of a sweep; none of a range without end or a glob."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep() or isinstance(override._value, Glob):
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]


def given(overrides: Sequence[str], *, multirun: bool = False) -> dict[str, list[Any]]:
    """Map each setting or group to the values that it is given; the last override of each counts."""
    return {override.key_or_group: values(override) for override in parsed(overrides, multirun=multirun)}


def quoted(text: str) -> str:
    """Quote any text for Hydra's grammar: `'epoch=3.ckpt'`."""
    quote = Quote.double if set(text) & set(f"'{_FOR_SHELL}") else Quote.single
    return QuotedString(text, quote).with_quotes()


def unquoted(text: str) -> str:
    """Return text without the quotes that Hydra's grammar would take; anything else as it is."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        return values(OverridesParser.create().parse_override(f"x={text}"))[0]
    except HydraException:
        return text


def home_quoted(argument: str) -> str:
    """Return `key=~/path` with the quotes that Hydra needs to read it as text; anything else as it is.

    Hydra's grammar has no `~` in a value, though no shell expands it behind the name of a setting.
    """
    key, equals, value = argument.partition("=")
    texts = _choices(value)
    homes = [text for text in texts if text.startswith("~")]
    readable = all(_plain(text.removeprefix("~") or "x") for text in texts)
    if not equals or argument.startswith("-") or not homes or not readable:
        return argument
    return f"{key}={','.join(quoted(text) if text in homes else text for text in texts)}"


def to_type(key: str, *texts: str) -> str:
    """Return `key=text` (several texts: a sweep) as it has to be typed, quoted for the shell and for Hydra.

    For example `"model.checkpoint='epoch=3.ckpt'"`.
    """
    override = f"{key}={','.join(map(quoted, texts))}"
    if len(texts) == 1 and _plain(texts[0]):
        return shlex.quote(f"{key}={texts[0]}")
    return _for_shell(override)


def _for_shell(override: str) -> str:
    return f'"{override}"' if not set(override) & set(_FOR_SHELL) else shlex.quote(override)


def _plain(text: str) -> bool:
    """Return whether Hydra takes the text without quotes."""
    try:
        return values(OverridesParser.create().parse_override(f"x={text}")) == [text]
    except HydraException:
        return False


def _parsed(text: str, multirun: bool) -> Override:
    if not _is_unicode(text):
        raise ConfigError(f"{text.encode('utf-8', 'backslashreplace').decode()}: is not encoded in UTF-8; rename it")
    try:
        override = OverridesParser.create().parse_override(text)
        found = values(override)
    except HydraException as error:
        raise ConfigError(_refused(text, error, multirun)) from error
    if override.key_or_group in _PATHS or _takes_text(setting_types().get(override.key_or_group)):
        several = override.is_choice_sweep() and not multirun
        if several or any(isinstance(value, list | dict) for value in found):
            raise ConfigError(_remedy(override.get_key_element(), text.partition("=")[2], multirun))
    return override


def _is_unicode(text: str) -> bool:
    """Return False for bytes that are no UTF-8, which Python keeps as halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _takes_text(hint: Any) -> bool:
    """Whether a setting of this type is one text (or null): a list of texts is none."""
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else ()
    several = any(typing.get_origin(kind) in (list, tuple, dict) for kind in alternatives)
    return str in (hint, *alternatives) and not several


def _refused(text: str, error: HydraException, multirun: bool) -> str:
    """Return the line about an override that Hydra's parser refuses."""
    key, equals, value = text.partition("=")
    try:
        plain = OverridesParser.create().parse_override(f"{key}=x").key_or_group
    except HydraException:
        equals, plain = "", key
    hints = setting_types()
    if not equals or (plain in hints and not _may_be_text(hints[plain])):
        reason = one_line(error, 2000)
        return f"{text}: cannot be read as KEY=VALUE ({reason})" if not equals else f"{plain}={value}: {reason}"
    outer = [name for name in hints if plain == name or plain.startswith(f"{name}.")]
    if "." in plain and not outer and not plain.startswith(("hydra.", "sweep.")):
        return f"{plain}: no such setting; {nearest(plain, list(hints))}"
    if typing.get_origin(hints.get(plain)) in (list, tuple):
        entries = ",".join(map(quoted, _choices(value.strip("[]"))))
        return f"{plain}={value}: quote each entry of the list: {_for_shell(f'{key}=[{entries}]')}"
    return _remedy(key, value, multirun)


def _may_be_text(hint: Any) -> bool:
    kinds = {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}
    return bool(kinds & {str, Any, dict})  # in a list, too


def _remedy(key: str, value: str, multirun: bool) -> str:
    texts = _choices(value) if multirun else [value]
    return (
        f"{key.lstrip('+')}={value}: has characters with a meaning of their own to Hydra; where they belong to the "
        f"text, quote it twice, for the shell and for Hydra: {to_type(key, *texts)}"
    )


def _choices(value: str) -> list[str]:
    """Return the parts of a sweep's values, split at commas outside of brackets."""
    parts = re.findall(r"(?:[^,()\[\]{}]|\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\})+", value)
    return [_bare(part.strip()) for part in parts] if ",".join(parts) == value else [value]


def _bare(part: str) -> str:
    quotes = len(part) > 1 and part[0] == part[-1] and part[0] in "'\""
    return part[1:-1] if quotes else part
