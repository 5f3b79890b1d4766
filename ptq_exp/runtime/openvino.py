"""Networks compiled by OpenVINO, one model for each shape of its inputs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.runtime.deployable import Deployable

PRECISIONS = {"f32": "f32", "bf16": "bf16"}
"""`runtime.precision` -> type of what is not executed as integers."""
_TRIAL = """
import sys, json, openvino
core = openvino.Core()
core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
"""


def import_openvino():
    """The package `openvino`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "runtime=openvino needs OpenVINO, which is not installed: pip install 'ptq-exp[openvino]' "
            "(in a checkout: pip install -e '.[openvino]')"
        ) from error
    return openvino


class OpenVINONetwork(nn.Module):
    """A network in plain operations, called as the original: eps = network(x, t, ...).

    The first call with other shapes traces and compiles; later calls with these shapes reuse the model.

    Args:
        network: see `ptq_exp.runtime.deployable`; any other module of tensors is compiled as it is.
        precision: of what is not executed as integers: f32, or bf16 (faster by 0 to 6 %, with errors of its own).
        threads: of one evaluation; None = those of torch.
        try_first: compile in a process of its own before, as OpenVINO can crash the process that compiles.

    Raises:
        ConfigError: an unknown precision, or OpenVINO is not installed.
    """

    def __init__(
        self, network: nn.Module, *, precision: str = "f32", threads: int | None = None, try_first: bool = True
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ConfigError(f"runtime.precision={precision}: choose one of {', '.join(PRECISIONS)}")
        self._openvino = import_openvino()
        self.source = [network]  # a list: its weights are not moved by `to`
        self.settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.try_first = try_first
        self.row: int | None = None
        self._compiled: dict[tuple, Any] = {}
        self._parameter = nn.Parameter(torch.zeros(()), requires_grad=False)  # code asks networks for their type

    def forward(self, *call: Tensor | None) -> Tensor:
        """The network's output, float32, on the CPU."""
        call = tuple(part for part in call if part is not None)
        if isinstance(self.source[0], Deployable) and self.source[0].rows > 1:
            call = (*call, torch.tensor([self._row_in_force()]))
        arrays = [np.ascontiguousarray(part.detach().cpu().numpy()) for part in call]
        compiled = self.compiled(call)
        result = compiled.infer_new_request(dict(enumerate(arrays)))
        return torch.from_numpy(np.array(result[0]))

    def select_row(self, row: int) -> None:
        """Choose the row of ranges of the next calls."""
        self.row = row

    def compiled(self, call: tuple[Tensor, ...]) -> Any:
        """The compiled model for inputs of the shapes and types of `call`."""
        key = tuple((tuple(part.shape), part.dtype) for part in call)
        if key not in self._compiled:
            self._compiled[key] = self._compile(self.model(call))
        return self._compiled[key]

    def model(self, call: tuple[Tensor, ...]) -> Any:
        """The network as an OpenVINO model (not compiled) for inputs like `call`."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer: shapes are constants on purpose
            return self._openvino.convert_model(
                self.source[0], example_input=tuple(call), input=[tuple(part.shape) for part in call]
            )

    def _row_in_force(self) -> int:
        if self.row is None:
            raise PTQError("runtime=openvino: the network has several rows of ranges: call select_row before it")
        return self.row

    def _compile(self, model: Any) -> Any:
        settings = dict(self.settings)
        if self.try_first and not self._survives(model, settings):
            # OpenVINO 2026.4 crashes on a GroupNormalization whose result is multiplied by [N, C, 1, 1], in f32
            settings["SNIPPETS_MODE"] = "DISABLE"
            if not self._survives(model, settings):
                raise PTQError("runtime=openvino: OpenVINO crashes when it compiles this network: use runtime=simulate")
        return self._openvino.Core().compile_model(model, "CPU", settings)

    def _survives(self, model: Any, settings: Mapping[str, Any]) -> bool:
        """Whether a process that compiles `model` ends well."""
        import json

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            self._openvino.save_model(model, path, compress_to_fp16=False)
            command = [sys.executable, "-P", "-c", _TRIAL, str(path), json.dumps(dict(settings))]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode > 0:  # it says why, and would here
            raise PTQError(f"runtime=openvino: {done.stderr.strip().splitlines()[-1]}")
        return done.returncode == 0
