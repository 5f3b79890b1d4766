"""The transforms that there are, and those that settings and records name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.quantization.transforms.base import Applied, Cost, Transform
from ptq_exp.quantization.transforms.low_rank import LowRankBranch
from ptq_exp.quantization.transforms.rotate import Rotate
from ptq_exp.quantization.transforms.smooth import Smooth

TRANSFORMS: dict[str, type[Transform]] = {"smooth": Smooth, "rotate": Rotate, "low_rank": LowRankBranch}
"""Name -> class. Add your own."""
_SETTING = "quantization.transforms"
_OF_RECORD = ("sites", "macs", "bytes", "left")
_ORDER = ("smooth", "rotate", "low_rank")


def transforms_of(entries: Sequence[str | Mapping[str, Any]]) -> list[Transform]:
    """Return the transforms that the setting `quantization.transforms` lists, in order.

    Args:
        entries: each a name, or a mapping of "name" and settings of that transform.

    Raises:
        ConfigError: a name or a setting is unknown, or a value impossible.
    """
    found = [_transform(entry) for entry in entries]
    places = [_ORDER.index(transform.name) for transform in found if transform.name in _ORDER]
    if places != sorted(places):
        raise ConfigError(f"{_SETTING}: the order is {', '.join(_ORDER)}: each works on what those before it left")
    for name in _ORDER[1:]:
        if sum(transform.name == name for transform in found) > 1:
            raise ConfigError(f"{_SETTING}: {name} is listed twice: leave one out")
    return found


def applied_from_dict(record: Mapping[str, Any]) -> Applied:
    """Return the transform that `Applied.to_dict` described, without what was fitted.

    Raises:
        DataError: it described something else.
    """
    try:
        own = {key: value for key, value in record.items() if key not in _OF_RECORD}
        sites = {site: tuple(layers) for site, layers in record["sites"].items()}
        cost = Cost(record["macs"], record["bytes"])
        return Applied(_transform(own), sites, cost=cost, left=dict(record.get("left", {})))
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = error if isinstance(error, ConfigError) else f"{type(error).__name__} {error}"
        raise DataError(f"the record of a transform is damaged, or its module is not imported: {reason}") from error


def _transform(entry: Any) -> Transform:
    settings = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{_SETTING}: {entry} is no transform: give its name, or {{name: NAME, SETTING: VALUE}}")
    name = settings["name"]
    if name not in TRANSFORMS:
        raise ConfigError(f"{_SETTING}: {name}: choose one of {', '.join(TRANSFORMS)}")
    own = {key: value for key, value in settings.items() if key != "name"}
    known = [setting.name for setting in fields(TRANSFORMS[name])]
    for key in own:
        if key not in known:
            raise ConfigError(f"{_SETTING}: {name} has no setting {key}; it has {', '.join(known) or 'none'}")
    return TRANSFORMS[name](**own)
