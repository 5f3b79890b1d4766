"""The engine OpenVINO: 8-bit kernels on CPUs, one compiled model for each shape of the inputs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, PTQError, QuantizationError
from ptq_exp.quantization import step_of
from ptq_exp.quantization.cost.account import describe
from ptq_exp.runtime.base import ExecutedLayer
from ptq_exp.runtime.deployable import Deployable, deployable
from ptq_exp.runtime.graph import executed_layers
from ptq_exp.runtime.plan import check_weights, integer_plan
from ptq_exp.runtime.probe import check_sums

PRECISIONS = ("f32", "bf16")
"""Types of what is not executed as integers."""
_TRIAL = """
import sys, json, openvino
core = openvino.Core()
core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
"""


class OpenVINO:
    """Executes quantized networks by OpenVINO.

    Args:
        precision: of what is not executed as integers, one of `PRECISIONS`; bf16 adds errors of its own.
        weights: one of `ptq_exp.runtime.plan.WEIGHTS`.
        regrid: quantize weights with several scales per output channel anew, 8 bits per channel.
        threads: of one evaluation; None = those of torch.

    Raises:
        ConfigError: OpenVINO is not installed, or a value is none of the above.
    """

    name = "openvino"

    def __init__(
        self, precision: str = "f32", weights: str = "as_saved", regrid: bool = False, threads: int | None = None
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"runtime.precision={precision}: choose one of {', '.join(PRECISIONS)}")
        check_weights(weights)
        _import_openvino()
        self.precision, self.weights, self.regrid, self.threads = precision, weights, regrid, threads
        self._made: tuple[nn.Module, tuple[Any, ...], dict, CompiledNetwork] | None = None

    def compile(self, network: nn.Module, example_call: tuple[Any, ...]) -> CompiledNetwork:
        """Make the module that is called as `network` is, after a probe of the processor's 8-bit sums.

        Raises:
            ConfigError: a layer cannot be executed, or the sums saturate; it says what to choose.
        """
        check_sums(lambda probe: CompiledNetwork(probe, threads=self.threads, try_first=False), self.weights, self.name)
        plan = integer_plan(network, regrid=self.regrid, seven_bits=self.weights == "7bit")
        plain = deployable(network, plan)
        made = CompiledNetwork(plain, precision=self.precision, threads=self.threads, rows=plain.rows)
        made.step = step_of(network)  # samplers choose the row of ranges by it
        self._made = network, tuple(example_call), plan, made
        return made

    def account(self) -> list[ExecutedLayer]:
        """List how each operation of the network that was compiled last is executed, by the engine's own graph."""
        if self._made is None:
            return []
        network, example, plan, made = self._made
        return executed_layers(made.any_model(example), plan, describe(network, example).rows)


class CompiledNetwork(nn.Module):
    """A network in plain operations, called as the original: eps = network(x, t, **conditions).

    The first call with other shapes traces and compiles; later calls with these shapes reuse the model.

    Args:
        network: see `ptq_exp.runtime.deployable`; any other module of tensors is compiled as it is.
        precision, threads: see `OpenVINO`.
        rows: of ranges; with several the row in force, `step`, is the network's last input.
        try_first: compile in a process of its own before, as OpenVINO can crash the process that compiles.
    """

    def __init__(
        self, network: nn.Module, *, precision: str = "f32", threads: int | None = None, rows: int = 1,
        try_first: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self._source = [network]  # a list: its weights are not moved by `to`
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        self._rows, self._try_first = rows, try_first
        self.step: nn.Module | None = None
        self._models: dict[tuple, Any] = {}
        self._type = nn.Parameter(torch.zeros(()), requires_grad=False)  # code asks networks for their type

    def forward(self, *tensors: Tensor, **conditions: Tensor) -> Tensor:
        """Return the network's output, on the device of its first input."""
        call = self._flat(tensors, conditions)
        model = self._model(call, tuple(conditions))
        result = model.infer_new_request({i: np.ascontiguousarray(part.numpy()) for i, part in enumerate(call)})
        return torch.from_numpy(np.array(result[0])).to(tensors[0].device, tensors[0].dtype)

    def any_model(self, example_call: tuple[Any, ...]) -> Any:
        """Return a compiled model: one that was used, or that of `example_call`."""
        if not self._models:
            *tensors, last = example_call
            conditions = last if isinstance(last, Mapping) else {}
            tensors = tensors if isinstance(last, Mapping) else [*tensors, last]
            self._model(self._flat(tensors, conditions, row=0), tuple(conditions))
        return next(iter(self._models.values()))

    def _flat(self, tensors, conditions: Mapping[str, Tensor], row: int | None = None) -> list[Tensor]:
        """All inputs in the order of the compiled network, on the CPU."""
        call = [part.detach().cpu() for part in (*tensors, *conditions.values())]
        if self._rows == 1:
            return call
        if row is None and (self.step is None or not self.step.is_set or len(self.step.row) != 1):
            raise QuantizationError("the network has several rows of ranges and none was chosen: call select_row first")
        return [*call, torch.tensor([row if row is not None else int(self.step.row)])]

    def _model(self, call: list[Tensor], names: tuple[str, ...]) -> Any:
        """Return the compiled model for inputs of the shapes and types of `call`."""
        key = (names, *((tuple(part.shape), part.dtype) for part in call))
        if key not in self._models:
            self._models[key] = self._compile(self._traced(call, names))
        return self._models[key]

    def _traced(self, call: list[Tensor], names: tuple[str, ...]) -> Any:
        return traced(self._source[0], call, names, self._rows)

    def _compile(self, model: Any) -> Any:
        return _import_openvino().Core().compile_model(model, "CPU", self.safe_settings(model))

    def safe_settings(self, model: Any) -> dict[str, Any]:
        """Return the settings that OpenVINO compiles `model` with, tried in a process of its own."""
        settings = dict(self._settings)
        if self._try_first and not _survives(model, settings):
            # OpenVINO 2026.4 crashes on a GroupNormalization whose result is multiplied by [N, C, 1, 1], in f32
            settings["SNIPPETS_MODE"] = "DISABLE"
            if not _survives(model, settings):
                raise PTQError("runtime=openvino: OpenVINO crashes when it compiles this network: use runtime=simulate")
        return settings


def traced(
    source: nn.Module, call: Sequence[Tensor], names: tuple[str, ...], rows: int = 1, *, any_batch: bool = False
) -> Any:
    """Trace a network for inputs like `call`, of which the last are the conditions `names`, as OpenVINO's model.

    Args:
        any_batch: leave the first dimension open, but that of the row.
    """
    if isinstance(source, Deployable):
        source.condition_names = names
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: shapes are constants on purpose
        if rows > 1:
            source(*call)  # makes what the trace is to have as constants
        shapes = [tuple(part.shape) for part in call]
        if any_batch:
            samples = len(call) - (rows > 1)
            shapes = [(-1, *shape[1:]) for shape in shapes[:samples]] + shapes[samples:]
        return _import_openvino().convert_model(source, example_input=tuple(call), input=shapes)


def _survives(model: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a process that compiles `model` ends well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        _import_openvino().save_model(model, path, compress_to_fp16=False)
        command = [sys.executable, "-P", "-c", _TRIAL, str(path), json.dumps(dict(settings))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 0:  # it says why, and would here
        raise PTQError(f"runtime=openvino: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "runtime=openvino needs OpenVINO, which is not installed: pip install 'ptq-exp[openvino]' "
            "(in a checkout: pip install -e '.[openvino]')"
        ) from error
    return openvino
