"""Call what a node of the configuration names by `_target_`, with the node's other entries as plain arguments."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from ptq_exp.errors import ConfigError, nearest, one_line
from ptq_exp.settings.strict import check_argument


def build(node: dict[str, Any], setting: str, **extra: Any) -> Any:
    """Call the constructor that `node["_target_"]` names with the node's other entries as plain arguments.

    Raises:
        ConfigError: there is no such constructor, or it does not take these arguments.
    """
    target, arguments = constructor(node, setting, **extra)
    return target(**arguments)


def constructor(node: Any, setting: str, **extra: Any) -> tuple[Callable, dict[str, Any]]:
    """Return the constructor that `build` calls, and its arguments, without calling it.

    Raises:
        ConfigError: there is no such constructor, an argument is unknown, missing, or of another type.
    """
    name = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{setting}={node}: {setting}._target_ must name a function or class")
    arguments = {key: value for key, value in node.items() if key != "_target_"} | extra
    try:
        target = pkgutil.resolve_name(name)
        parameters = inspect.signature(target).parameters
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{setting}._target_={name}: no such function or class ({one_line(error)})") from error
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in parameters and not open_ended:
            raise ConfigError(f"{setting}.{key}: {name} has no such argument; {nearest(key, list(parameters))}")
    for key, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and key not in arguments:
            raise ConfigError(f"{setting}.{key}: {name} needs it, and it is not set")
    for key in arguments.keys() & parameters.keys():
        check_argument(f"{setting}.{key}", arguments[key], parameters[key].annotation)
    return target, arguments
