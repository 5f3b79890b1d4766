"""Write a saved quantized model as a file that other programs read: OpenVINO's format, ONNX, or GGUF weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq_exp.errors import ConfigError, command_line
from ptq_exp.storage.paths import with_home

SETTINGS = {
    "quantized": "PATH: a run folder, or its sub-folder quantized",
    "format": "openvino (model.xml, model.bin) | onnx (model.onnx, QuantizeLinear and DequantizeLinear of opset 21) | "
    "gguf (weights alone, in blocks of 32)",
    "out": "DIR: a new folder, or that of an earlier export, which is replaced; with gguf a FILE",
    "batch": "samples of one evaluation (8), or dynamic: any number, slower",
    "checkpoint": "PATH: of the full-precision model, for a latent model whose first stage is elsewhere",
    "runtime.weights": "as_saved | 7bit: for CPUs without VNNI instructions, whose 8-bit sums saturate",
    "runtime.regrid": "false | true: quantize weights with a scale per group of input channels anew, 8 bits each",
}
"""Setting -> what it is."""
_PATHS = ("quantized", "out", "checkpoint")
_HELP = f"""
settings, KEY=VALUE:
{chr(10).join(f"  {key:<16} {meaning}" for key, meaning in SETTINGS.items())}

The folder holds the file, export.json (digest of the source, versions, inputs and outputs, sampling steps, how each
layer is executed and why those in floating point are), example.npz (inputs, and the simulation's answer) and README.md:
six lines that run the file.

examples:
  python -m ptq_exp export quantized=runs/deploy_w8a8/<time> format=openvino out=exported
  python -m ptq_exp export quantized=runs/deploy_w8a8/<time> format=onnx out=exported batch=dynamic
  python -m ptq_exp export quantized=runs/ndtc_w4a8/<time> format=gguf out=weights.gguf
"""


def main(argv: Sequence[str]) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m ptq_exp export", description=__doc__, epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see below")
    with command_line():
        given = settings(parser.parse_args(argv).settings)
        if given["format"] == "gguf":
            print(_write_gguf(given))
            return
        from ptq_exp.deploy.export import Export  # torch takes seconds

        about = Export(**given).write()
        print(summary(about, given["out"]))


def settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the arguments of `ptq_exp.deploy.export.Export` from KEY=VALUE.

    Raises:
        ConfigError: one is unknown, given twice, lacks a value or is missing.
    """
    given: dict[str, Any] = {}
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in SETTINGS:
            from ptq_exp.settings.compose import nearest

            raise ConfigError(f"{key}: no such setting of export; {nearest(key, list(SETTINGS))}")
        if not value or key in given:
            raise ConfigError(f"{key}: give it {'one value' if key in given else 'a value'}, {key}=VALUE")
        given[key] = with_home(value, key) if key in _PATHS else value
    for key in ("quantized", "format", "out"):
        if key not in given:
            raise ConfigError(f"{key} is missing: give {key}=, {SETTINGS[key]}")
    if given.get("batch", "").isdecimal():
        given["batch"] = int(given["batch"])
    regrid = given.get("runtime.regrid", "false").lower()
    if regrid not in ("true", "false"):
        raise ConfigError(f"runtime.regrid={given['runtime.regrid']}: choose one of true, false")
    given["runtime.regrid"] = regrid == "true"
    return {key.removeprefix("runtime."): value for key, value in given.items()}


def _write_gguf(given: dict[str, Any]) -> str:
    """Write a GGUF file, and say what is in it.

    Raises:
        ConfigError: a setting says how a network is executed, which such a file does not.
    """
    for key in given.keys() - {"quantized", "format", "out", "checkpoint"}:
        if key != "regrid" or given[key]:
            raise ConfigError(f"{key}: a GGUF file holds weights alone, nothing that is executed: leave it out")
    from ptq_exp.deploy.gguf_file import check_gguf, write_gguf
    from ptq_exp.deploy.load import load_quantized

    check_gguf()
    about = write_gguf(load_quantized(given["quantized"], given.get("checkpoint")), Path(given["out"]))
    worst = max(about["distance"], key=about["distance"].get)
    return "\n".join([
        f"tensors: {', '.join(f'{n} {kind}' for kind, n in about['types'].items())}",
        f"relative distance from the quantized weights: {about['distance'][worst]:.2g} at most ({worst})", given["out"],
    ])


def summary(about: dict[str, Any], out: str) -> str:
    """Say what was written and how it is executed."""
    errors = ", ".join(f"{value:.2g} by {name}" for name, value in about["error_to_simulation"].items())
    reasons = sorted({layer["reason"] for layer in about["layers"] if layer["executed"] == "float"} - {""})
    lines = [
        f"{about['int8_share']:.2%} of the multiplications are executed as integers by {about['executed_by']}",
        *([f"in floating point: {'; '.join(reasons)}"] if reasons else []),
        f"relative distance from the simulation: {errors}",
        f"{', '.join([*about['files'], 'export.json', 'README.md'])} in {out}",
    ]
    return "\n".join(lines)
