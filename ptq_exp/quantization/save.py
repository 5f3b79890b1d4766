"""A quantized network in two files: quantized.safetensors (its tensors) and quantization.json (all else).

In the folder of a component of a pipeline the first one has the name that diffusers looks for.

`quantization.json` is a dictionary with ``format`` and ``version``, ``rules`` (pattern, spec, reason), ``report``'s
entries (``totals``, ``shares``, ``layers``), ``quantizers`` (ranges to be read by people, see `range_table`),
``tensors`` (layout of the other file, see `ptq_exp.quantization.packed_network`), ``file`` (its name, SHA-256, size and
the theoretical one) and whatever the caller adds about the model. Each file holds a hash of the other: what belongs to
another network, was cut off or edited is refused. Nothing in the files is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ptq_exp.errors import ConfigError, DataError, QuantizationError, one_line
from ptq_exp.quantization.cost.account import range_table
from ptq_exp.quantization.cost.report import Report
from ptq_exp.quantization.offload.writer import write_tensors
from ptq_exp.quantization.packed_network import packed_state, restore_state_
from ptq_exp.quantization.packed_network_1 import restore_joined_
from ptq_exp.quantization.place import quantize_
from ptq_exp.quantization.plain_rules import rule_from_dict, rule_to_dict
from ptq_exp.quantization.specs import Rule, TensorSpec
from ptq_exp.storage.atomic import atomic_path, file_digest
from ptq_exp.storage.plain_json import compact, dump_indented

FORMAT, VERSION = "ptq-exp quantized network", 2
VERSION_OF_FORMATS = 3
"""Of networks with number formats: what reads version 2 alone refuses them, and all others stay readable for it."""
TENSORS_FILE, DESCRIPTION_FILE = "quantized.safetensors", "quantization.json"
COMPONENT_TENSORS_FILE = "diffusion_pytorch_model.safetensors"
TENSORS_FILES = (TENSORS_FILE, COMPONENT_TENSORS_FILE)
_HASH = "description_sha256"
_RESTORE = {1: restore_joined_, VERSION: restore_state_, VERSION_OF_FORMATS: restore_state_}


def save_quantized(
    folder: str | os.PathLike, network: nn.Module, rules: Sequence[Rule], report: Report, about: Mapping[str, Any],
    tensors_file: str = TENSORS_FILE, prefix: str = "",
) -> dict[str, Any]:
    """Write a calibrated network to `folder`; returns the content of quantization.json.

    Args:
        folder: created where it is missing; files in it are replaced.
        network: with frozen weights and calibrated ranges.
        rules: those that `quantize_` placed its quantizers by.
        report: bits and cost of its operations; with candidate widths, one that knows their shares.
        about: further entries, plain values for JSON.
        tensors_file: name of the file of tensors, one of `TENSORS_FILES`.
        prefix: of all names in the network, left out in the file of tensors.

    Raises:
        QuantizationError: the network is not calibrated, or a weight is not on the grid of its ranges.
        PTQError: a file cannot be written.
    """
    tensors, layout = packed_state(network)
    version = version_of(rules)
    description = {
        "format": FORMAT, "version": version, **about, **report.to_dict(), "rules": [rule_to_dict(r) for r in rules],
        "quantizers": range_table(network), "tensors": layout,
    }
    path = Path(folder) / tensors_file
    metadata = {"format": FORMAT, "version": str(version), _HASH: _description_hash(description)}
    with atomic_path(path) as temporary:
        # not by the library, which orders metadata anew each time, and copies all tensors
        write_tensors({name.removeprefix(prefix): value for name, value in tensors.items()}, temporary, metadata)
    description["file"] = {
        "name": tensors_file, "prefix": prefix, "sha256": file_digest(path), "bytes": path.stat().st_size,
        "header_bytes": _header_bytes(path), "theoretical_bytes": report.totals["weight_bytes"],
    }
    dump_indented(path.with_name(DESCRIPTION_FILE), description)
    return description


def tensors_bytes(network: nn.Module) -> int:
    """Return the size of the file of tensors that `save_quantized` would write; all of it is in memory meanwhile.

    Raises:
        QuantizationError: as `save_quantized`.
    """
    metadata = {"format": FORMAT, "version": str(VERSION), _HASH: "0" * 64}
    return len(save(packed_state(network)[0], metadata))


def version_of(rules: Sequence[Rule]) -> int:
    """Return the version of the files of a network with these rules."""
    specs = [getattr(rule.spec, field.name) for rule in rules if rule.spec is not None for field in fields(rule.spec)]
    formats = any(isinstance(spec, TensorSpec) and spec.format is not None for spec in specs)
    return VERSION_OF_FORMATS if formats else VERSION


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the content of quantization.json in `folder`, if it and the file of tensors are whole and belong together.

    Raises:
        DataError: a file is missing, truncated, edited, of an unknown version, or holds something else.
    """
    path = Path(folder) / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable description of a quantized network: {one_line(error)}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DataError(f"{path} describes no saved network (a run with save_quantized=false writes such a file)")
    if type(description.get("version")) is not int or description["version"] not in _RESTORE:
        raise DataError(
            f"{path} has version {one_line(description.get('version'))} of the format, this code reads "
            f"{', '.join(map(str, _RESTORE))}: install the ptq-exp that wrote it, or quantize again"
        )
    _check_tensors_file(path.with_name(tensors_file_of(description)), description)
    return description


def tensors_file_of(description: Mapping[str, Any]) -> str:
    """Return the name of the file of tensors that quantization.json belongs to."""
    file = description.get("file")
    name = file.get("name") if isinstance(file, dict) else None
    return name if name in TENSORS_FILES else TENSORS_FILE


def load_quantized_(
    network: nn.Module, folder: str | os.PathLike, example_inputs: tuple, sha256: str | None = None
) -> Report:
    """Turn `network`, full precision or of arbitrary weights, in place into the one that was saved in `folder`.

    Neither calibration data nor full-precision weights are needed, and nothing is quantized again: all parameters and
    ranges are those that were saved, bit for bit. After an error the network is of no use.

    Args:
        network: of the architecture and number type of the one that was saved.
        folder: see `save_quantized`.
        example_inputs: positional arguments of one sample, see `quantize_`.
        sha256: of the file of tensors, by a description that was read before; None = whichever network is there.

    Returns:
        The report of its operations, without shares of candidate widths.

    Raises:
        DataError: a file is missing, truncated, edited, of an unknown version, of another network, or replaced
            meanwhile.
    """
    folder = Path(folder)
    with _unchanged(folder):
        return _restored(network, folder, _description(folder, sha256), example_inputs)


def _description(folder: Path, sha256: str | None) -> dict[str, Any]:
    """Read the description in `folder`, of the network with this `sha256`; see `load_quantized_`."""
    try:
        description = read_description(folder)
    except DataError as error:
        if sha256 is None:
            raise
        raise changed(folder) from error  # it was whole when it was opened
    if sha256 not in (None, description["file"]["sha256"]):
        raise changed(folder)
    return description


def _restored(network: nn.Module, folder: Path, description: Mapping[str, Any], example_inputs: tuple) -> Report:
    path = folder / tensors_file_of(description)
    try:
        prefix = description["file"].get("prefix", "")
        tensors = {f"{prefix}{name}": value for name, value in load_file(path).items()}
        report = quantize_(network, [rule_from_dict(rule) for rule in description["rules"]], example_inputs)
        with torch.no_grad():
            _RESTORE[description["version"]](network, tensors, description["tensors"])
    except (ConfigError, QuantizationError) as error:
        raise DataError(f"{folder} does not fit the model: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder / DESCRIPTION_FILE} is damaged: {one_line(repr(error))}") from error
    return report


@contextmanager
def _unchanged(folder: Path) -> Iterator[None]:
    """Raise DataError if the file of tensors in `folder` is replaced or written to meanwhile."""
    before = _stamp(folder)
    try:
        yield
    except (DataError, OSError) as error:
        if _stamp(folder) != before:
            raise changed(folder) from error
        raise
    if _stamp(folder) != before:
        raise changed(folder)


def changed(folder: Path) -> DataError:
    """Return the error of a folder that does not hold the network any more that was opened."""
    return DataError(f"{folder} changed while it was read: load it again when nothing writes to it any more")


def _stamp(folder: Path) -> list[tuple[int, int, int]]:
    """Return what changes when a file of tensors is replaced or written to."""
    found = []
    for name in TENSORS_FILES:
        with suppress(OSError):
            file = os.stat(folder / name)
            found.append((file.st_ino, file.st_size, file.st_mtime_ns))
    return found


def _check_tensors_file(path: Path, description: Mapping[str, Any]) -> None:
    """Raise DataError unless the file is the one that was described, and names this description."""
    file = description.get("file")
    expected = file.get("sha256") if isinstance(file, dict) else None
    if not isinstance(expected, str):
        raise DataError(f"{path.with_name(DESCRIPTION_FILE)} is damaged: it has no hash of {path.name}")
    found = file_digest(path)
    if found != expected:
        raise DataError(
            f"{path} is not the file that {DESCRIPTION_FILE} describes, but truncated, changed or another one "
            f"({path.stat().st_size} bytes with SHA-256 {found[:12]}, expected {one_line(expected[:12])}): copy both "
            "files again"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no complete safetensors file ({one_line(error)})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(description["version"]):
        raise DataError(f"{path} holds no quantized network of version {description['version']}, but other tensors")
    if metadata.get(_HASH) != _description_hash(description):
        raise DataError(
            f"{path.with_name(DESCRIPTION_FILE)} was edited, or belongs to another {path.name}: copy both again"
        )


def _header_bytes(path: Path) -> int:
    """Bytes of a safetensors file before its numbers: the names, types and shapes of its tensors."""
    with open(path, "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _description_hash(description: Mapping[str, Any]) -> str:
    """SHA-256 of all but the entry about the file of tensors, independent of the order of keys."""
    digest = hashlib.sha256()
    for piece in compact({key: value for key, value in description.items() if key != "file"}):
        digest.update(piece.encode())
    return digest.hexdigest()
