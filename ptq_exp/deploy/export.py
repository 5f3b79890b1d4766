"""A saved quantized model as a file for engines, with all that a program needs to run it without ptq-exp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptq_exp import __version__
from ptq_exp.deploy.artifact import Artifact, grid_entry
from ptq_exp.deploy.export_page import page
from ptq_exp.deploy.load import load_opened
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.diffusion import Call
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import select_row
from ptq_exp.runtime.export import FORMATS, Exported, check_format, export_network
from ptq_exp.runtime.plan import check_weights
from ptq_exp.storage.atomic import file_digest, replacing_folder, write_npz
from ptq_exp.storage.plain_json import to_plain, write_json

ABOUT, EXAMPLE, PAGE = "export.json", "example.npz", "README.md"
DYNAMIC = "dynamic"
_FILES = {ABOUT, EXAMPLE, PAGE, "model.xml", "model.bin", "model.onnx", "model.onnx.data"}
_LIBRARIES = ("torch", "openvino", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    """What is written, and how.

    Attributes:
        quantized: the saved model, a run folder or its sub-folder `quantized`.
        format: one of `ptq_exp.runtime.export.FORMATS`.
        out: the folder that is made; one with an earlier export is replaced.
        batch: samples of one evaluation, or `DYNAMIC`: any number, which engines run slower.
        checkpoint: see `ptq_exp.load_quantized`.
        weights, regrid: see `ptq_exp.runtime.openvino.OpenVINO`.

    Raises:
        ConfigError: a value is none of the above, or a library is not installed.
    """

    quantized: str
    format: str
    out: str
    batch: int | str = 8
    checkpoint: str | None = None
    weights: str = "as_saved"
    regrid: bool = False

    def __post_init__(self) -> None:
        check_format(self.format)
        check_weights(self.weights)
        if self.batch != DYNAMIC and not (type(self.batch) is int and self.batch >= 1):
            raise ConfigError(f"batch={self.batch}: give a number of samples, 1 or more, or {DYNAMIC} for any number")
        out = Path(self.out)
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= _FILES):
            raise ConfigError(f"out={self.out} holds other files: give a new folder, or that of an earlier export")

    def write(self) -> dict[str, Any]:
        """Write the folder; returns the content of its export.json.

        Raises:
            PTQError: the saved model cannot be read or executed, or a file cannot be written.
        """
        artifact = Artifact.open(self.quantized)
        quantized = load_opened(artifact, self.checkpoint)
        with replacing_folder(Path(self.out)) as folder:
            return self._written(artifact, quantized, folder)

    def _written(self, artifact: Artifact, quantized: QuantizedModel, folder: Path) -> dict[str, Any]:
        rows = None if quantized.rows is None else quantized.rows.tolist()
        if rows is not None:
            select_row(quantized.network, rows[0])
        example, any_batch = quantized.model.example_inputs(), self.batch == DYNAMIC
        made = export_network(
            quantized.network, _first_step(quantized, 2 if any_batch else int(self.batch)), example,
            folder / FORMATS[self.format], any_batch=any_batch, regrid=self.regrid, weights=self.weights,
        )
        values = {name: value.numpy() for name, value in (made.inputs | made.outputs).items()}
        write_npz(folder / EXAMPLE, **values)
        digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        about = to_plain(self._about(artifact, quantized, made, rows) | {"files": digests})
        write_json(folder / ABOUT, about)
        (folder / PAGE).write_text(page(about), encoding="utf-8")
        return about

    def _about(
        self, artifact: Artifact, quantized: QuantizedModel, made: Exported, rows: list[int] | None
    ) -> dict[str, Any]:
        saturation = None if made.saturation is None else {"weights": self.weights, "sum_of_right_one": made.saturation}
        return {
            "format": self.format, "file": FORMATS[self.format],
            "source": {"model": quantized.model.name, "bits": artifact.settings["bits"]["name"],
                       "sha256": artifact.digest, "ptq_exp": artifact.description["ptq_exp"]},
            "versions": {"ptq_exp": __version__} | {name: version(name) for name in _LIBRARIES if find_spec(name)},
            "inputs": _ports(made, made.inputs), "outputs": _ports(made, made.outputs), "settings": made.settings,
            "sampler": grid_entry(quantized.grid, quantized.guidance_scale) | {
                "clip_sample": quantized.model.clip_sample, "rows": rows,
                "corrected": quantized.statistics is not None,
            },
            "error_to_simulation": made.errors, "probe": saturation,
            "int8_share": made.layers.int8_share, "executed_by": made.engine,
            "layers": [asdict(layer) for layer in made.layers],
        }


def _first_step(quantized: QuantizedModel, n: int) -> Call:
    """Make the call of `n` samples of the first sampling step: standard normal noise of seed 0."""
    model = quantized.model
    x = torch.randn(n, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    conditions = {name: value.contiguous() for name, value in model.draw_conditions(range(n), 0).items()}
    return Call(x, quantized.grid.network_time(0, n).contiguous(), conditions)


def _ports(made: Exported, values: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": str(value.dtype).removeprefix("torch."), "shape": list(made.shapes[name])}
        for name, value in values.items()
    ]
