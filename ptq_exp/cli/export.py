"""Write a saved quantized model for other programs: OpenVINO, ONNX, GGUF, ComfyUI, or diffusers with sdnq."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptq_exp.cli.commands import parser_of
from ptq_exp.errors import ConfigError, command_line, nearest
from ptq_exp.storage.paths import with_home

SETTINGS = {
    "quantized": "PATH: a run folder, or its sub-folder quantized",
    "format": "openvino (model.xml, model.bin) | onnx (model.onnx, QuantizeLinear and DequantizeLinear of opset 21) | "
    "gguf (weights alone, in blocks of 32) | comfy (weights alone, a safetensors file with ComfyUI's int8) | sdnq (a "
    "folder that diffusers loads with the package sdnq)",
    "out": "DIR: a new folder, or that of an earlier export, which is replaced; with gguf and comfy a FILE",
    "batch": "samples of one evaluation (8), or dynamic: any number, slower",
    "checkpoint": "PATH: of the full-precision model, for a latent model whose first stage is elsewhere",
    "runtime.weights": "as_saved | 7bit: for CPUs without VNNI instructions, whose 8-bit sums saturate",
    "runtime.regrid": "false | true: quantize weights with a scale per group of input channels anew, 8 bits each",
}
"""Setting -> what it is."""
_PATHS = ("quantized", "out", "checkpoint")
_EXECUTED = ("openvino", "onnx")
_WEIGHTS = {"gguf": "a GGUF file", "comfy": "a ComfyUI file", "sdnq": "a folder for sdnq"}
"""Formats that hold weights alone, in words."""
_HELP = f"""
settings, KEY=VALUE:
{chr(10).join(f"  {key:<16} {meaning}" for key, meaning in SETTINGS.items())}

With openvino and onnx the folder holds the file, export.json (digest of the source, versions, inputs and outputs,
sampling steps, how each layer is executed and why those in floating point are), example.npz (inputs, and the
simulation's answer) and README.md: six lines that run the file.

examples:
  python -m ptq_exp export quantized=runs/deploy_w8a8/<time> format=openvino out=exported
  python -m ptq_exp export quantized=runs/deploy_w8a8/<time> format=onnx out=exported batch=dynamic
  python -m ptq_exp export quantized=runs/ndtc_w4a8/<time> format=gguf out=weights.gguf
  python -m ptq_exp export quantized=runs/convrot_w8a8/<time> format=comfy out=weights.safetensors
  python -m ptq_exp export quantized=runs/svdquant_w4a8/<time> format=sdnq out=exported
"""


def main(argv: Sequence[str]) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = parser_of("export", __doc__, _HELP)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see below")
    with command_line():
        given = settings(parser.parse_args(argv).settings)
        if given["format"] in _WEIGHTS:
            print(_write_weights(given))
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
            raise ConfigError(f"{key}: no such setting of export; {nearest(key, list(SETTINGS))}")
        if not value or key in given:
            raise ConfigError(f"{key}: give it {'one value' if key in given else 'a value'}, {key}=VALUE")
        given[key] = with_home(value, key) if key in _PATHS else value
    for key in ("quantized", "format", "out"):
        if key not in given:
            raise ConfigError(f"{key} is missing: give {key}=, {SETTINGS[key]}")
    if given["format"] not in (*_EXECUTED, *_WEIGHTS):
        raise ConfigError(f"format={given['format']}: choose one of {', '.join((*_EXECUTED, *_WEIGHTS))}")
    if given.get("batch", "").isdecimal():
        given["batch"] = int(given["batch"])
    regrid = given.get("runtime.regrid", "false").lower()
    if regrid not in ("true", "false"):
        raise ConfigError(f"runtime.regrid={given['runtime.regrid']}: choose one of true, false")
    given["runtime.regrid"] = regrid == "true"
    return {key.removeprefix("runtime."): value for key, value in given.items()}


def _write_weights(given: dict[str, Any]) -> str:
    """Write a file or folder of weights, and say what is in it.

    Raises:
        ConfigError: a setting says how a network is executed, which none of them does.
    """
    for key in given.keys() - {"quantized", "format", "out", "checkpoint"}:
        if key != "regrid" or given[key]:
            what = _WEIGHTS[given["format"]]
            raise ConfigError(f"{key}: {what} holds weights alone, nothing that is executed: leave it out")
    # nothing is computed with it here but once for each weight
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    write = _writer(given["format"])
    from ptq_exp.deploy.load import load_quantized

    about = write(load_quantized(given["quantized"], given.get("checkpoint")), Path(given["out"]))
    lines = [f"tensors: {', '.join(f'{n} {kind}' for kind, n in about['types'].items())}"]
    lines += [f"not quantized there: {n}, {why}" for why, n in Counter(about.get("plain", {}).values()).items()]
    if "distance" in about:
        worst = max(about["distance"], key=about["distance"].get)
        lines.append(f"relative distance from the quantized weights: {about['distance'][worst]:.2g} at most ({worst})")
    return "\n".join([*lines, given["out"]])


def _writer(format: str) -> Callable[..., dict[str, Any]]:
    """Return the function that writes a format, once its package is known to be there."""
    if format == "gguf":
        from ptq_exp.deploy.gguf_file import check_gguf, write_gguf

        check_gguf()
        return write_gguf
    if format == "sdnq":
        from ptq_exp.deploy.sdnq_folder import check_sdnq, write_sdnq

        check_sdnq()
        return write_sdnq
    from ptq_exp.deploy.comfy_file import write_comfy

    return write_comfy


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
