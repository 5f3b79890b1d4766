"""What OpenVINO really executes, read from its runtime graph and joined with the plan and the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_exp.quantization import Row
from ptq_exp.runtime.base import ExecutedLayer, Execution
from ptq_exp.runtime.plan import FLOAT, INT8, Plan, entry_of

Kernels = Mapping[str, Sequence[tuple[str, bool]]]
"""Module name -> (kernel, whether its operands are 8-bit integers) of each node that multiplies there."""

_BYTES = {"i8", "u8"}
_MULTIPLYING = {"Convolution", "FullyConnected", "MatMul", "Subgraph", "Deconvolution", "GroupConvolution"}
# names of traced networks, and those that exported files have
_LAYER = re.compile(
    r"(?:__module\.)?network\.([\w.]+?)\.(?:parts\.\d+|layer)/(?:aten::(?:_convolution|linear)|Conv|MatMul|Gemm)"
)
_PRODUCT = re.compile(r"(?:__module\.)?network\.([\w.]+)/(?:aten::(?:matmul|softmax)|MatMul|Softmax)")

# OpenVINO may call a product by its factor, as which it executes the scales of its operands
_SCALED = re.compile(r"(?:__module\.)?network\.([\w.]+\.products\.\w+)/(?:aten::mul|Mul)")


def executed_layers(kernels: Kernels, plan: Plan, rows: Sequence[Row]) -> Execution:
    """Say how each operation of a report is executed.

    Args:
        kernels: of OpenVINO's compiled model of a `Deployable`, see `kernels_of`.
        rows: operations of the quantized network; the products of an attention end in .qk and .av.
    """
    made = []
    for row in rows:
        entry = entry_of(plan, row)
        if entry is None:
            made.append(ExecutedLayer(row.name, row.type, FLOAT, "", row.macs, row.reason or "not quantized"))
            continue
        found = kernels.get(entry.name, [])
        integer = bool(found) and all(is_integer for _, is_integer in found)
        if entry.grouped is not None:  # the graph names the type that the input has before the kernel quantizes it
            integer = bool(found) and entry.executed == INT8
        names = ", ".join(sorted({kernel for kernel, _ in found})) or "not found in the runtime graph"
        reason = "the engine chose a float kernel" if not integer and entry.executed == INT8 else entry.reason
        made.append(ExecutedLayer(row.name, row.type, INT8 if integer else FLOAT, names, row.macs, reason))
    return Execution(made)


def kernels_of(compiled: Any) -> Kernels:
    """Find in OpenVINO's runtime graph what multiplies, by the name of the module that it stands for."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = _text(info, "layerType")
        if kind not in _MULTIPLYING:
            continue
        types = [source.get_element_type().get_type_name() for source in node.inputs()]
        integer = sum(name in _BYTES for name in types) >= 2
        for layer in _modules(_text(info, "originalLayersNames"), node.get_friendly_name(), kind, integer):
            found.setdefault(layer, []).append((_text(info, "primitiveType"), integer))
    return found


def _modules(names: str, own: str, kind: str, integer: bool) -> set[str]:
    """Find the planned layers among the original names of a node of the runtime graph, else in its `own`.

    Args:
        integer: whether it multiplies integers.
    """
    layers = _LAYER.findall(names) or _LAYER.findall(own)
    if kind != "Subgraph" and layers:
        return set(layers[:1])  # the node may have taken in what follows
    if kind not in ("Subgraph", "MatMul"):
        return set()
    # a subgraph may be of the factor alone
    scaled = _SCALED.findall(names) if kind == "MatMul" or integer else []
    return {*_PRODUCT.findall(names), *scaled}


def _text(info: Mapping[str, Any], key: str) -> str:
    return str(info[key].get()) if key in info else ""
