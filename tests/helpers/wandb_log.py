"""The transaction log of an offline W&B run, read without W&B's service: settings, last numbers, exit code.

The file is a log of records in 32 KiB blocks, the format of LevelDB, each a protocol buffer of W&B. An offline run
has no other file that holds its settings or its numbers.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ptq_exp.errors import DataError

_BLOCK, _MAGIC = 32768, b":W&B\xe1\xbe\x00"
_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The payloads of a log, in order; a log that was cut off ends where it was cut.

    Raises:
        DataError: the file cannot be read, is no log of W&B, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if data and not data.startswith(_MAGIC):
        raise DataError(f"{path} is no log of an offline W&B run, or of a format from after version 0")
    position, parts = len(_MAGIC), []
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:  # the rest of a block that has no room for a header is padding
            position += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        chunk = data[position : position + length]
        position += length
        if kind == 0 or len(chunk) < length:  # written ahead, or cut off
            return
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise DataError(f"{path} is damaged at byte {position - length}")
        parts = [chunk] if kind in (_WHOLE, _FIRST) else [*parts, chunk]
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)


def read_log(path: Path) -> dict[str, Any]:
    """What an offline run left: {"config", "summary", "tags", "exit_code"}.

    "summary" holds the last value of everything that was logged. "exit_code" is None for a run that did not end, and
    all of it is empty for one that was killed in its first second.

    Raises:
        DataError: as `records`, or this version of W&B writes other records.
    """
    from wandb.proto import wandb_internal_pb2 as wandb_records

    run: dict[str, Any] = {"config": {}, "summary": {}, "tags": [], "exit_code": None}
    for payload in records(path):
        record = wandb_records.Record()
        try:
            record.ParseFromString(payload)
        except Exception as error:  # protobuf's own class is not importable in every version
            raise DataError(f"{path} holds a record that this version of wandb does not know: {error}") from error
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run["tags"] = list(record.run.tags)
            _apply(run["config"], record.run.config.update)
        elif kind == "config":
            _apply(run["config"], record.config.update)
        elif kind == "history":
            _apply(run["summary"], record.history.item)
        elif kind == "summary":
            _apply(run["summary"], record.summary.update)
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run


def _apply(target: dict[str, Any], items: Iterable[Any]) -> None:
    """Set each item, {"key" or "nested_key": path, "value_json"}, in `target`."""
    for item in items:
        *parents, key = item.nested_key or [item.key]
        place = target
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[key] = json.loads(item.value_json)
