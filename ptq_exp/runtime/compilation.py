"""Networks traced, compiled by OpenVINO, and kept: compiled models are found again by what decides them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.errors import PTQError, not_installed
from ptq_exp.runtime.deployable import Deployable
from ptq_exp.runtime.graph import Kernels, kernels_of
from ptq_exp.runtime.grouped import GroupedLinear, packed_
from ptq_exp.storage.cache import ArtifactCache

KIND = "runtime"
"""Of the entries in the cache."""
SUSPICIOUS = 0.05
"""Relative error of a compiled network from which on it is compiled without fused kernels, to be compared."""
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


class Files:
    """OpenVINO's files of a network, traced once for each shape of its inputs; a temporary folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ptq-exp-")
        self._paths: dict[tuple, Path] = {}

    def of(self, key: tuple, trace: Callable[[], Any]) -> Path:
        """Return the path (.xml) of the model that `trace` makes, or has made for this `key`."""
        if key not in self._paths:
            path = Path(self._folder.name) / f"{len(self._paths)}" / "model.xml"
            path.parent.mkdir()
            self._paths[key] = save_ir(trace(), path)
        return self._paths[key]


def compiled(
    files: Callable[[], Path], settle: Callable[[Path], Mapping[str, Any]], settings: Mapping[str, Any],
    error: Callable[[Any], float], *, cache: ArtifactCache | None, key: Mapping[str, Any],
) -> Compiled:
    """Compile a network, or find what was compiled before.

    Args:
        files: traces the network and returns the path of OpenVINO's files of it.
        settle: returns the settings to compile the files at a path with; they start from `settings`.
        error: of what a compiled model computes, relative to the network.
        key: identifies the network and the shapes of its inputs; what identifies engine and processor is added.
    """

    def make() -> Compiled:
        path = files()
        size, settled = sum(file.stat().st_size for file in path.parent.iterdir()), settle(path)
        core = import_openvino().Core()
        made = core.compile_model(core.read_model(path), "CPU", dict(settled))
        if (found := error(made)) > SUSPICIOUS and "SNIPPETS_MODE" not in settled:
            # OpenVINO 2026.4 fuses some chains of linear layers into one kernel that computes something else
            plainer = {**settled, "SNIPPETS_MODE": "DISABLE"}
            other = core.compile_model(core.read_model(path), "CPU", plainer)
            if error(other) < found / 3:
                made, settled = other, plainer
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
    source = positional(source, names)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: shapes are constants on purpose
        if rows > 1:
            source(*call)  # makes what the trace is to have as constants
        graph = torch.jit.trace(source, tuple(call), check_trace=False)  # the check traces twice more
        with _no_telemetry():
            model = import_openvino().convert_model(graph, example_input=tuple(call))
    shapes = [list(part.shape) for part in call]
    if any_batch:
        samples = len(call) - (rows > 1)
        shapes = [[-1, *shape[1:]] for shape in shapes[:samples]] + shapes[samples:]
    model.reshape(dict(enumerate(shapes)))
    if any(isinstance(module, GroupedLinear) for module in source.modules()):
        packed_(model)
    model.traced_from = graph  # constants of the model lie in its memory
    return model


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Keep OpenVINO's converter from reporting its use to a server, in processes that it forks off this one.

    It has no setting for it, but leaves out what runs as continuous integration.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def positional(source: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return a network whose conditions `names` are its last positional arguments: tracers know no others."""
    if isinstance(source, Deployable):
        source.condition_names = names
        return source
    return _Positional(source, names) if names else source


class _Positional(nn.Module):
    """A network that takes its conditions as positional arguments."""

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
    }


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
        raise not_installed("runtime=openvino", "OpenVINO", "openvino") from error
    return openvino
