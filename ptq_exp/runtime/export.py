"""A quantized network as a file that engines read, OpenVINO's own or ONNX, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, not_installed
from ptq_exp.quantization import step_of
from ptq_exp.quantization.cost.account import describe
from ptq_exp.runtime.base import ExecutedLayer, Execution
from ptq_exp.runtime.compilation import import_openvino, save_ir, traced
from ptq_exp.runtime.deployable import Deployable, deployable
from ptq_exp.runtime.export_onnx import SESSION, check_installed, onnx_model, write_onnx
from ptq_exp.runtime.graph import executed_layers, kernels_of
from ptq_exp.runtime.openvino import CompiledNetwork
from ptq_exp.runtime.plan import FLOAT, INT8, Plan, check_weights, entry_of, integer_plan
from ptq_exp.runtime.probe import saturation

FORMATS = {"openvino": "model.xml", "onnx": "model.onnx"}
"""Name of a format -> its file; OpenVINO's weights lie beside it, in model.bin."""
OUTPUT = "eps"
_ANY = "batch"
_OF_MACHINE = ("INFERENCE_NUM_THREADS", "PERFORMANCE_HINT")
"""Settings of OpenVINO that change no numbers."""


@dataclass(frozen=True)
class Exported:
    """A written network.

    Attributes:
        inputs: name -> the values that it was tried with, in order.
        outputs: the same; what the simulation makes of these inputs.
        shapes: of inputs and outputs, "batch" where any number of samples can be given.
        settings: that the engine is to be given.
        layers: how each operation is executed.
        engine: whose runtime graph says so; "the plan" where the engine is not installed.
        errors: engine -> relative distance of its answer from the simulation's.
        saturation: see `ptq_exp.runtime.probe`, of the engine on this machine; None where none is installed.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    shapes: dict[str, tuple[int | str, ...]]
    settings: dict[str, Any]
    layers: Execution
    engine: str
    errors: dict[str, float]
    saturation: float | None


def check_format(name: Any) -> None:
    """Raise ConfigError unless `name` is that of a format whose libraries are installed."""
    if name not in FORMATS:
        raise ConfigError(f"format={name}: choose one of {', '.join(FORMATS)}")
    if name == "onnx":
        check_installed()
    elif find_spec("openvino") is None:
        raise not_installed("format=openvino", "OpenVINO", "openvino")


def export_network(
    network: nn.Module, call: tuple[Any, ...], example: tuple[Any, ...], path: Path, *, any_batch: bool = False,
    regrid: bool = False, weights: str = "as_saved",
) -> Exported:
    """Write a calibrated `network` into `path`, whose name is one of `FORMATS`.

    Args:
        call: (x, t, conditions by name) of the samples that the file is for, and that it is tried with. With several
            rows of ranges the one in force is an input, int64 [1].
        example: the same of one sample.
        any_batch: let the file take any number of samples, in place of those of `call`.
        regrid, weights: see `OpenVINO`.

    Raises:
        ConfigError: a layer cannot be executed; the message says what to set.
    """
    name = next(name for name, file in FORMATS.items() if file == path.name)
    check_format(name)
    check_weights(weights)
    plan = integer_plan(network, regrid=regrid, seven_bits=weights == "7bit", asked=f"format={name}")
    plain = deployable(network, plan)
    inputs = _named(plain, network, call)
    plain.condition_names = tuple(call[2])
    with torch.no_grad():
        outputs = {OUTPUT: network(call[0], call[1], **call[2]).detach().cpu()}
    (_write_openvino if name == "openvino" else _write_onnx)(plain, inputs, path, any_batch)
    values = {key: value.numpy() for key, value in inputs.items()}
    errors, settings = {}, dict(SESSION)
    if name == "onnx":
        errors["onnxruntime"] = _distance(_run_onnx(path, values), outputs[OUTPUT])
    layers, by, ratio = _planned(plan, network, example), "the plan", None
    if find_spec("openvino") is not None:
        compiled, own = _compiled(plain, path)
        settings = own if name == "openvino" else settings
        errors["openvino"] = _distance(compiled(values)[0], outputs[OUTPUT])
        layers = executed_layers(kernels_of(compiled), plan, describe(network, example).rows)
        by = f"openvino {version('openvino')}"
        ratio = saturation(lambda probe: CompiledNetwork(probe, try_first=False), weights)
    samples = len(inputs) - (plain.rows > 1)
    shapes: dict[str, tuple[int | str, ...]] = {
        key: (_ANY, *value.shape[1:]) if any_batch and n < samples else tuple(value.shape)
        for n, (key, value) in enumerate(inputs.items())
    }
    shapes[OUTPUT] = (shapes["x"][0], *outputs[OUTPUT].shape[1:])
    return Exported(inputs, outputs, shapes, settings, layers, by, errors, ratio)


def _named(plain: Deployable, network: nn.Module, call: tuple[Any, ...]) -> dict[str, Tensor]:
    x, t, conditions = call
    inputs = {"x": x, "t": t, **conditions}
    if plain.rows > 1:
        inputs["row"] = step_of(network).row
    return {name: value.detach().cpu().contiguous() for name, value in inputs.items()}


def _write_openvino(plain: Deployable, inputs: Mapping[str, Tensor], path: Path, any_batch: bool) -> None:
    model = traced(plain, list(inputs.values()), plain.condition_names, plain.rows, any_batch=any_batch)
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    model.outputs[0].get_tensor().set_names({OUTPUT})
    save_ir(model, path)


def _write_onnx(plain: Deployable, inputs: Mapping[str, Tensor], path: Path, any_batch: bool) -> None:
    write_onnx(onnx_model(plain, list(inputs.values()), list(inputs), any_batch=any_batch), path)


def _compiled(plain: Deployable, path: Path) -> tuple[Any, dict[str, Any]]:
    """OpenVINO's compiled model of a written file, and the settings that it was compiled with."""
    core = import_openvino().Core()
    settings = CompiledNetwork(plain, rows=plain.rows).safe_settings(path)
    kept = {key: value for key, value in settings.items() if key not in _OF_MACHINE}
    return core.compile_model(core.read_model(path), "CPU", settings), kept


def _run_onnx(path: Path, values: Mapping[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for entry in SESSION.items():
        options.add_session_config_entry(*entry)
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], dict(values))[0]


def _planned(plan: Plan, network: nn.Module, example: Sequence[Any]) -> Execution:
    """List the operations as they are planned, for engines that are not here."""
    made = []
    for row in describe(network, tuple(example)).rows:
        entry = entry_of(plan, row)
        integer = entry is not None and entry.executed == INT8
        reason = (row.reason or "not quantized") if entry is None else entry.reason
        made.append(ExecutedLayer(row.name, row.type, INT8 if integer else FLOAT, "", row.macs, reason))
    return Execution(made)


def _distance(found: np.ndarray, wanted: Tensor) -> float:
    return float(np.linalg.norm(found - wanted.numpy()) / max(float(wanted.norm()), 1e-30))
