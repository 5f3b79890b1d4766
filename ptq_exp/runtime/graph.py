"""What OpenVINO really executes, read from its runtime graph and joined with the plan and the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_exp.quantization import Row
from ptq_exp.runtime.base import ExecutedLayer
from ptq_exp.runtime.plan import INT8, Plan

_BYTES = {"i8", "u8"}
_MULTIPLYING = {"Convolution", "FullyConnected", "MatMul", "Subgraph", "Deconvolution", "GroupConvolution"}
# names of traced networks, and those that exported files have
_LAYER = re.compile(
    r"(?:__module\.)?network\.([\w.]+?)\.(?:parts\.\d+|layer)/(?:aten::(?:_convolution|linear)|Conv|MatMul|Gemm)"
)
_PRODUCT = re.compile(r"(?:__module\.)?network\.([\w.]+)/(?:aten::(?:matmul|softmax)|MatMul|Softmax)")


def executed_layers(compiled: Any, plan: Plan, rows: Sequence[Row]) -> list[ExecutedLayer]:
    """List how each operation of a report is executed.

    Args:
        compiled: OpenVINO's compiled model of a `Deployable`.
        rows: operations of the quantized network; the products of an attention end in .qk and .av.
    """
    found = _kernels(compiled)
    made = []
    for row in rows:
        name = row.name if row.name in plan else row.name.rpartition(".")[0]
        if name not in plan:
            made.append(ExecutedLayer(row.name, row.type, "float", "", row.macs, row.reason or "not quantized"))
            continue
        entry, kernels = plan[name], found.get(name, [])
        integer = bool(kernels) and all(is_integer for _, is_integer in kernels)
        names = ", ".join(sorted({kernel for kernel, _ in kernels})) or "not found in the runtime graph"
        reason = "the engine chose a float kernel" if not integer and entry.executed == INT8 else entry.reason
        made.append(ExecutedLayer(row.name, row.type, "integer" if integer else "float", names, row.macs, reason))
    return made


def integer_share(rows: Sequence[ExecutedLayer]) -> float:
    """Compute the share of the multiplications that are executed as integers, 0 to 1."""
    total = sum(row.macs for row in rows)
    return sum(row.macs for row in rows if row.executed == "integer") / total if total else 0.0


def _kernels(compiled: Any) -> dict[str, list[tuple[str, bool]]]:
    """Map module names to (kernel, whether its operands are 8-bit integers) of the nodes that multiply."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = _text(info, "layerType")
        if kind not in _MULTIPLYING:
            continue
        types = [source.get_element_type().get_type_name() for source in node.inputs()]
        integer = sum(name in _BYTES for name in types) >= 2
        for layer in _modules(_text(info, "originalLayersNames"), kind):
            found.setdefault(layer, []).append((_text(info, "primitiveType"), integer))
    return found


def _modules(names: str, kind: str) -> set[str]:
    """Find the planned layers among the original names of a node of the runtime graph."""
    layers = _LAYER.findall(names)
    if kind != "Subgraph" and layers:
        return set(layers[:1])  # the node may have taken in what follows
    return set(_PRODUCT.findall(names)) if kind in ("Subgraph", "MatMul") else set()


def _text(info: Mapping[str, Any], key: str) -> str:
    return str(info[key].get()) if key in info else ""
