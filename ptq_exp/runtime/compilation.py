"""Networks traced, compiled by OpenVINO, and kept: compiled models are found again by what decides them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.runtime.deployable import Deployable
from ptq_exp.runtime.graph import Kernels, kernels_of
from ptq_exp.storage.cache import ArtifactCache

KIND = "runtime"
"""Of the entries in the cache."""
_TRIAL = """
import sys, json, openvino
core = openvino.Core()
core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
"""


@dataclass(frozen=True)
class Compiled:
    """A compiled model.

    Attributes:
        model: OpenVINO's.
        kernels: what multiplies in its runtime graph.
        settings: that it was compiled with.
        file_bytes: size of OpenVINO's two files of the network.
    """

    model: Any
    kernels: Kernels
    settings: Mapping[str, Any]
    file_bytes: int


def compiled(
    trace: Callable[[], Any], settle: Callable[[Path], Mapping[str, Any]], settings: Mapping[str, Any], *,
    cache: ArtifactCache | None, key: Mapping[str, Any],
) -> Compiled:  # fmt: skip
    """Trace and compile a network, or find what was compiled before.

    Args:
        trace: makes OpenVINO's model of the network.
        settle: returns the settings to compile the files at a path with; they start from `settings`.
        key: identifies the network and the shapes of its inputs; what identifies engine and processor is added.
    """

    def make() -> Compiled:
        model = trace()
        with tempfile.TemporaryDirectory() as folder:
            path = save_ir(model, Path(folder) / "model.xml")
            size, settled = sum(file.stat().st_size for file in Path(folder).iterdir()), settle(path)
        made = import_openvino().Core().compile_model(model, "CPU", dict(settled))
        return Compiled(made, kernels_of(made), settled, size)

    if cache is None or cache.mode == "off":
        return make()
    spec = {**key, **_machine(), "settings": dict(settings)}
    return cache.get_or_make(KIND, spec, make=make, save=_write, load=_read, suffix=".blob")[0]


def traced(
    source: nn.Module, call: Sequence[Tensor], names: tuple[str, ...], rows: int = 1, *, any_batch: bool = False
) -> Any:
    """Trace a network for inputs like `call`, of which the last are the conditions `names`, as OpenVINO's model.

    Args:
        any_batch: leave the first dimension open, but that of the row.
    """
    if isinstance(source, Deployable):
        source.condition_names = names
    elif names:
        source = _Positional(source, names)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: shapes are constants on purpose
        if rows > 1:
            source(*call)  # makes what the trace is to have as constants
        graph = torch.jit.trace(source, tuple(call), check_trace=False)  # the check traces twice more
        model = import_openvino().convert_model(graph, example_input=tuple(call))
    shapes = [list(part.shape) for part in call]
    if any_batch:
        samples = len(call) - (rows > 1)
        shapes = [[-1, *shape[1:]] for shape in shapes[:samples]] + shapes[samples:]
    model.reshape(dict(enumerate(shapes)))
    return model


class _Positional(nn.Module):
    """A network that takes its conditions as positional arguments: tracers know no others."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return self.network(x, t, **dict(zip(self.names, conditions, strict=True)))


def save_ir(model: Any, path: Path) -> Path:
    """Write OpenVINO's two files of a model, `path` (.xml) and the same name with .bin."""
    import_openvino().save_model(model, path, compress_to_fp16=False)
    return path


def safe_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a process which compiles the files at `path` survives.

    Raises:
        PTQError: there are none, or OpenVINO says why it cannot.
    """
    settings = dict(settings)
    if not _survives(path, settings):
        # OpenVINO 2026.4 crashes on a GroupNormalization whose result is multiplied by [N, C, 1, 1], in f32
        settings["SNIPPETS_MODE"] = "DISABLE"
        if not _survives(path, settings):
            raise PTQError("runtime=openvino: OpenVINO crashes when it compiles this network: use runtime=simulate")
    return settings


def _survives(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a process that compiles the files at `path` ends well."""
    command = [sys.executable, "-P", "-c", _TRIAL, str(path), json.dumps(dict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 0:  # it says why, and would here
        raise PTQError(f"runtime=openvino: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


def _machine() -> dict[str, Any]:
    """Describe what decides a compiled model beside the network and its settings."""
    openvino = import_openvino()
    core = openvino.Core()
    return {
        "openvino": openvino.__version__, "processor": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        "can": sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }  # fmt: skip


def _write(made: Compiled, path: Path) -> None:
    """Write a line of JSON and the compiled model, from which its runtime graph has not all names again."""
    about = {"kernels": made.kernels, "settings": dict(made.settings), "file_bytes": made.file_bytes}
    with path.open("wb") as file:
        file.write(json.dumps(about).encode() + b"\n")
        file.write(made.model.export_model().getbuffer())


def _read(path: Path) -> Compiled:
    with path.open("rb") as file:
        about = json.loads(file.readline())
        blob = file.read()
    model = import_openvino().Core().import_model(blob, "CPU", about["settings"])
    return Compiled(model, about["kernels"], about["settings"], about["file_bytes"])


def import_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        ConfigError: it is not installed; the message says how to install it.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "runtime=openvino needs OpenVINO, which is not installed: pip install 'ptq-exp[openvino]' "
            "(in a checkout: pip install -e '.[openvino]')"
        ) from error
    return openvino
