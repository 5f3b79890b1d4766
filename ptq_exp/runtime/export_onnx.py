"""Quantized networks as ONNX files: integer weights, `QuantizeLinear` and `DequantizeLinear` around what multiplies."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq_exp.errors import ConfigError, not_installed
from ptq_exp.runtime.deployable import Deployable
from ptq_exp.runtime.operators import OPSET, spelt_for_onnx

SESSION = {
    "session.qdqisint8allowed": "1", "optimization.disable_specified_optimizers": "WeightBiasQuantization"
}
"""Entries of the options of ONNX Runtime's session.

Without the first it refuses signed 8-bit activations. Without the second it rounds biases to the products of the two
scales, which moves the answer of small networks by percents.
"""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2**31 - 2**20
"""Bytes of a file of protocol buffers; weights beyond it lie in a file beside."""


def check_installed() -> None:
    """Raise ConfigError unless the libraries of the extra `onnx` are there."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise not_installed("format=onnx", ", ".join(missing), "onnx")
    if find_spec("torch.onnx.ops") is None:
        raise ConfigError(f"format=onnx needs torch 2.8 or newer, this is {torch.__version__}: upgrade torch")


def onnx_model(plain: Deployable, call: Sequence[Tensor], names: Sequence[str], *, any_batch: bool = False) -> Any:
    """Write a network for inputs like `call` as an ONNX model, whose nodes are called after the network's modules.

    Args:
        plain: the network; `condition_names` are set.
        names: of the inputs.
        any_batch: leave the first dimension open, but that of the row.
    """
    check_installed()
    with torch.no_grad(), _quiet():
        plain(*call)  # makes what the file is to have as constants
        with spelt_for_onnx():
            shapes = _open_shapes(plain, call) if any_batch else None
            program = torch.onnx.export(
                plain, tuple(call), dynamo=True, opset_version=OPSET, input_names=list(names), output_names=["eps"],
                dynamic_shapes=shapes, verbose=False, external_data=False,
            )
    model = program.model_proto
    for node in model.graph.node:
        node.name = _name(node)
    _forget_origins(model)
    return model


def write_onnx(model: Any, path: Path) -> None:
    """Write a model that `onnx.checker` finds valid; weights beyond 2 GB into `path` with `.data` at the end.

    Raises:
        ValueError: it is not valid.
    """
    import onnx

    beside = f"{path.name}.data" if model.ByteSize() > _LARGEST else None
    onnx.save_model(model, path, save_as_external_data=beside is not None, location=beside)
    onnx.checker.check_model(path, full_check=True)


def _open_shapes(plain: Deployable, call: Sequence[Tensor]) -> tuple[tuple[dict[int, Any], ...]]:
    batch = torch.export.Dim("batch")
    samples = len(call) - (plain.rows > 1)
    return (tuple({0: batch} if n < samples else {} for n in range(len(call))),)


def _name(node: Any) -> str:
    """Make the name `<module>/<operation>` followed by the exporter's own, which is unique."""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    module = (ast.literal_eval(scopes) or [""])[:-1][-1:] if scopes else []
    return f"{module[0]}/{node.op_type}/{node.name}" if module and module[0] else node.name


def _forget_origins(model: Any) -> None:
    """Drop what the exporter notes of where each value comes from: lines of source files on this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        if part is not model:
            part.doc_string = ""
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporter and optimiser say of their own work from standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
