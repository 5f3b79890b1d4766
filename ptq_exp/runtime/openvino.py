"""The engine OpenVINO: 8-bit kernels on CPUs, one compiled model for each shape of the inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization import step_of
from ptq_exp.quantization.cost.account import describe
from ptq_exp.runtime.base import Execution
from ptq_exp.runtime.compilation import Compiled, Files, compiled, import_openvino, positional, safe_settings, traced
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.fingerprint import fingerprint
from ptq_exp.runtime.graph import executed_layers
from ptq_exp.runtime.grouped import group_settings
from ptq_exp.runtime.not_a_number import keep_nan
from ptq_exp.runtime.plan import GROUPS, WEIGHTS, check_weights, integer_plan
from ptq_exp.runtime.probe import check_sums, probed_groups
from ptq_exp.storage.cache import ArtifactCache

PRECISIONS = ("f32", "bf16")
"""Types of what is not executed as integers."""


class OpenVINO:
    """Executes quantized networks by OpenVINO.

    Args:
        precision: of what is not executed as integers, one of `PRECISIONS`; bf16 adds errors of its own.
        weights: one of `ptq_exp.runtime.plan.WEIGHTS`, or "groups": linear layers of 4-bit weights keep their groups,
            and the engine quantizes their inputs itself (`ptq_exp.runtime.grouped`).
        regrid: quantize weights with several scales per output channel anew, 8 bits per channel.
        threads: of one evaluation; None = those of torch.
        cache: where compiled models are kept; None = nowhere.

    Attributes:
        saturation: what the processor's 8-bit sums are of the right ones, by the probe; None before `compile`.

    Raises:
        ConfigError: OpenVINO is not installed, or a value is none of the above.
    """

    name = "openvino"

    def __init__(
        self, precision: str = "f32", weights: str = "as_saved", regrid: bool = False, threads: int | None = None,
        cache: ArtifactCache | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"runtime.precision={precision}: choose one of {', '.join(PRECISIONS)}")
        check_weights(weights, (*WEIGHTS, GROUPS))
        self.version = import_openvino().__version__.partition("-")[0]
        self.precision, self.weights, self.regrid, self.threads = precision, weights, regrid, threads
        self.cache, self.saturation = cache, None
        self._files: dict[int, Files] = {}
        self._made: tuple[nn.Module, tuple[Any, ...], dict, CompiledNetwork] | None = None

    def compile(self, network: nn.Module, example_call: tuple[Any, ...]) -> CompiledNetwork:
        """Make the module that is called as `network` is, after a probe of the processor's 8-bit sums.

        Raises:
            ConfigError: a layer cannot be executed, or the sums saturate; it says what to choose.
        """
        def small(probe: nn.Module) -> CompiledNetwork:
            return CompiledNetwork(probe, threads=self.threads, try_first=False, cache=self.cache)

        self.saturation = check_sums(small, "7bit" if self.weights == "7bit" else "as_saved", self.name)
        seven_bits, groups = self.weights == "7bit", self.weights == GROUPS
        plan = probed_groups(integer_plan(network, regrid=self.regrid, seven_bits=seven_bits, groups=groups), small)
        plain = deployable(network, plan)
        made = CompiledNetwork(
            plain, precision=self.precision, threads=self.threads, rows=plain.rows, cache=self.cache
        )
        made.step = step_of(network)  # samplers choose the row of ranges by it
        self._made = network, tuple(example_call), plan, made
        return made

    def in_float(self, network: nn.Module, precision: str) -> CompiledNetwork:
        """Make the module that executes a full-precision `network` by the same engine, to be compared with.

        Args:
            precision: one of `PRECISIONS`.
        """
        files = self._files.setdefault(id(network), Files())  # one trace for all precisions
        return CompiledNetwork(network, precision=precision, threads=self.threads, cache=self.cache, files=files)

    def account(self) -> Execution:
        """Say how each operation of the network that was compiled last is executed, by the engine's own graph."""
        if self._made is None:
            return Execution()
        network, example, plan, made = self._made
        return executed_layers(made.any_model(example).kernels, plan, describe(network, example).rows)

    @property
    def file_bytes(self) -> int:
        """Size of OpenVINO's files of the network that was compiled last; 0 before."""
        if self._made is None:
            return 0
        _, example, _, made = self._made
        return made.any_model(example).file_bytes


class CompiledNetwork(nn.Module):
    """A network in plain operations, called as the original: eps = network(x, t, **conditions).

    The first call with other shapes traces and compiles; later calls with these shapes reuse the model.

    Args:
        network: see `ptq_exp.runtime.deployable`; any other module of tensors is compiled as it is.
        precision, threads: see `OpenVINO`.
        rows: of ranges; with several the row in force, `step`, is the network's last input.
        try_first: compile in a process of its own before, as OpenVINO can crash the process that compiles.
        cache: where compiled models are kept; None = nowhere.
        files: of the same network that were traced before; None = there are none.
    """

    def __init__(
        self, network: nn.Module, *, precision: str = "f32", threads: int | None = None, rows: int = 1,
        try_first: bool = True, cache: ArtifactCache | None = None, files: Files | None = None,
    ) -> None:
        super().__init__()
        self._source = [network]  # a list: its weights are not moved by `to`
        threads = threads or torch.get_num_threads()
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": _take_all_cores(threads), "PERFORMANCE_HINT": "LATENCY", **group_settings(network),
        }
        self._rows, self._try_first, self._cache, self._files = rows, try_first, cache, files or Files()
        # before a trace leaves anything in it
        self._fingerprint = "" if cache is None or cache.mode == "off" else fingerprint(network)
        self.step: nn.Module | None = None
        self._models: dict[tuple, Compiled] = {}
        self._type = nn.Parameter(torch.zeros(()), requires_grad=False)  # code asks networks for their type

    def forward(self, *tensors: Tensor, **conditions: Tensor) -> Tensor:
        """Return the network's output, on the device of its first input."""
        call = self._flat(tensors, conditions)
        result = keep_nan(_evaluated(self._model(call, tuple(conditions)).model, call), call)
        return result.to(tensors[0].device, tensors[0].dtype if tensors[0].is_floating_point() else result.dtype)

    def any_model(self, example_call: tuple[Any, ...]) -> Compiled:
        """Return a compiled model: one that was used, or that of `example_call`."""
        if not self._models:
            tensors, conditions = _split(example_call)
            self._model(self._flat(tensors, conditions, row=0), tuple(conditions))
        return next(iter(self._models.values()))

    def files(self, call: tuple[Any, ...]) -> tuple[Path, list[Tensor]]:
        """Return the path (.xml) of OpenVINO's files of the network for inputs like `call`, and these in order."""
        tensors, conditions = _split(call)
        flat = self._flat(tensors, conditions, row=0)
        return self._path(flat, tuple(conditions)), flat

    def safe_settings(self, path: Path) -> dict[str, Any]:
        """Return the settings that OpenVINO compiles the files at `path` with, tried in a process of its own."""
        return safe_settings(path, self._settings) if self._try_first else dict(self._settings)

    def _flat(self, tensors, conditions: Mapping[str, Tensor], row: int | None = None) -> list[Tensor]:
        """All inputs in the order of the compiled network, on the CPU."""
        call = [part.detach().cpu() for part in (*tensors, *conditions.values())]
        if self._rows == 1:
            return call
        if row is None and (self.step is None or not self.step.is_set or len(self.step.row) != 1):
            raise QuantizationError("the network has several rows of ranges and none was chosen: call select_row first")
        return [*call, torch.tensor([row if row is not None else int(self.step.row)])]

    def _model(self, call: Sequence[Tensor], names: tuple[str, ...]) -> Compiled:
        """Return the compiled model for inputs of the shapes and types of `call`."""
        key = _key(call, names)
        if key not in self._models:
            self._models[key] = compiled(
                lambda: self._path(call, names), self.safe_settings, self._settings,
                lambda model: self._error(model, call, names), cache=self._cache,
                key={"network": self._fingerprint, "inputs": [str(part) for part in key]},
            )
        return self._models[key]

    @torch.no_grad()
    def _error(self, model: Any, call: Sequence[Tensor], names: tuple[str, ...]) -> float:
        """Relative error of what a compiled model computes of `call`."""
        wanted = positional(self._source[0], names)(*call).double()
        return float((_evaluated(model, call).double() - wanted).norm() / wanted.norm().clamp(min=1e-12))

    def _path(self, call: Sequence[Tensor], names: tuple[str, ...]) -> Path:
        return self._files.of(_key(call, names), lambda: traced(self._source[0], call, names, self._rows))


def _take_all_cores(threads: int) -> bool:
    """Say whether so many threads are all that may be used: then each is best bound to a core of its own.

    Left to the system two of them share a core at times, for seconds, and take as long as one. Fewer threads are not
    bound: those of several processes would all be on the first cores.
    """
    return threads > 1 and hasattr(os, "sched_getaffinity") and threads == len(os.sched_getaffinity(0))


def _evaluated(model: Any, call: Sequence[Tensor]) -> Tensor:
    """Return what OpenVINO's compiled model computes of inputs on the CPU."""
    result = model.infer_new_request({i: np.ascontiguousarray(part.numpy()) for i, part in enumerate(call)})
    return torch.from_numpy(np.array(result[0]))


def _key(call: Sequence[Tensor], names: tuple[str, ...]) -> tuple:
    """Names of the conditions, shapes and types of inputs."""
    return (names, *((tuple(part.shape), part.dtype) for part in call))


def _split(call: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
    """Positional arguments and conditions of a call, which may end in a mapping of them."""
    *tensors, last = call
    return (tuple(tensors), last) if isinstance(last, Mapping) else ((*tensors, last), {})
