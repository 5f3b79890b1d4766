"""Which elements of a tensor share a range: all, those of an output channel, of a group, or of a segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptq_exp.errors import ConfigError


class Granularity:
    """One of the classes below.

    Ranges are tables ``[rows, segments]``: `rows` of output channels, `segments` of input channels.
    """

    def rows(self, out_channels: int) -> int:
        """Return the number of rows: 1, or one per output channel."""
        return out_channels

    def segments(self, channels: int) -> tuple[int, ...] | None:
        """Return the sizes of the segments that `channels` input channels are cut into; None = all in one."""
        return None


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One range for the whole tensor."""

    def rows(self, out_channels: int) -> int:
        """Return 1."""
        return 1


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One range per output channel of a weight."""


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One range per `size` input channels of each output channel of a weight; the last group may be smaller.

    Raises:
        ConfigError: `size` is below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"PerGroup.size={self.size!r}: give a number of input channels, 1 or more")

    def segments(self, channels: int) -> tuple[int, ...]:
        """Return the sizes of the groups."""
        whole, rest = divmod(channels, self.size)
        return (self.size,) * whole + (rest,) * (rest > 0)


@dataclass(frozen=True)
class Segments(Granularity):
    """Contiguous segments of input channels, each with ranges of the granularity `within` of its own.

    Attributes:
        channels: sizes of the segments, which add up to all channels.
        within: of each segment; groups begin anew at a segment's start.

    Raises:
        ConfigError: no segments, one of no channels, or segments within segments.
    """

    channels: tuple[int, ...]
    within: Granularity = PerTensor()

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(f"Segments.channels={self.channels}: give positive numbers of channels")
        if not isinstance(self.within, Granularity) or isinstance(self.within, Segments):
            raise ConfigError(f"Segments.within={self.within!r}: choose PerTensor(), PerChannel() or PerGroup(size)")

    def rows(self, out_channels: int) -> int:
        """Return those of `within`."""
        return self.within.rows(out_channels)

    def segments(self, channels: int) -> tuple[int, ...]:
        """Return the sizes of all parts, whatever number of channels they should add up to."""
        return tuple(part for size in self.channels for part in self.within.segments(size) or (size,))


def segmented_as(granularity: Granularity, channels: tuple[int, ...] | None) -> Granularity:
    """Return `granularity` inside segments of so many `channels`, in place of any it has; None = without segments."""
    within = granularity.within if isinstance(granularity, Segments) else granularity
    return within if channels is None else Segments(channels, within)


def splits_channels(granularity: Granularity) -> bool:
    """Return whether it has a row for each output channel."""
    return granularity.rows(2) > 1


_KINDS = {"tensor": PerTensor, "channel": PerChannel, "group": PerGroup, "segments": Segments}


def to_plain(granularity: Granularity) -> dict[str, Any]:
    """Return a granularity as plain values for JSON, such as {"per": "group", "size": 16}."""
    kind = next(name for name, cls in _KINDS.items() if type(granularity) is cls)
    if isinstance(granularity, Segments):
        return {"per": kind, "channels": list(granularity.channels), "within": to_plain(granularity.within)}
    return {"per": kind, **asdict(granularity)}


def from_plain(plain: Mapping[str, Any]) -> Granularity:
    """Return the granularity that `to_plain` described.

    Raises:
        KeyError, TypeError, ConfigError: it described something else.
    """
    arguments = {key: value for key, value in plain.items() if key != "per"}
    if "within" in arguments:
        arguments["within"] = from_plain(arguments["within"])
    return _KINDS[plain["per"]](**arguments)


def from_version_1(kind: str, segments: list[int] | None, group_size: int | None) -> Granularity:
    """Return the granularity that three fields of a rule said in saved models of version 1.

    Raises:
        KeyError, TypeError, ConfigError: they said something else.
    """
    within = PerGroup(group_size) if kind == "group" else _KINDS[kind]()
    return segmented_as(within, None if segments is None else tuple(segments))
