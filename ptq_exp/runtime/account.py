"""What an engine really executes, read from its runtime graph and joined with the plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_exp.runtime.plan import FLOAT, INT8, Plan

INTEGER_TYPES = {"i8", "u8"}
_MULTIPLYING = {"Convolution", "FullyConnected", "MatMul", "Subgraph", "Deconvolution", "GroupConvolution"}
_LAYER = re.compile(r"__module\.network\.([\w.]+?)\.(?:parts\.\d+|layer)/aten::(?:_convolution|linear)")
_PRODUCT = re.compile(r"__module\.network\.([\w.]+)/aten::(?:matmul|softmax)")


@dataclass(frozen=True)
class Executed:
    """How the engine executes one layer, or the products of one attention.

    Attributes:
        kind: Conv2d, Linear, Attention, ...
        executed: "int8" or "float", by the kernels of the runtime graph.
        kernel: the engine's name of the kernel, and of the type of its operands.
        macs: multiplications of one sample.
        reason: why in float, or what was changed to be int8.
    """

    layer: str
    kind: str
    executed: str
    kernel: str
    macs: float
    reason: str = ""


def int8_share(rows: Sequence[Executed], kinds: Sequence[str] | None = None) -> float:
    """Share of the multiplications that are executed as int8, of layers of the given kinds (None: of all)."""
    chosen = [row for row in rows if kinds is None or row.kind in kinds]
    total = sum(row.macs for row in chosen)
    return sum(row.macs for row in chosen if row.executed == INT8) / total if total else 0.0


def executed_layers(compiled: Any, plan: Plan, macs: Mapping[str, float]) -> list[Executed]:
    """One row for each planned layer.

    Args:
        compiled: OpenVINO's compiled model of a `Deployable`.
        macs: multiplications of each layer; of an attention, of its two products.
    """
    found = _kernels(compiled)
    rows = []
    for name, entry in plan.items():
        kernels = found.get(name, [])
        integer = bool(kernels) and all(is_integer for _, is_integer in kernels)
        names = ", ".join(sorted({kernel for kernel, _ in kernels})) or "not found in the runtime graph"
        reason = entry.reason
        if not integer and entry.executed == INT8:
            reason = "the engine chose a float kernel"
        rows.append(Executed(name, entry.kind, INT8 if integer else FLOAT, names, macs.get(name, 0.0), reason))
    return rows


def _kernels(compiled: Any) -> dict[str, list[tuple[str, bool]]]:
    """Module name -> (kernel, whether its operands are 8-bit integers) of the nodes that multiply."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = _text(info, "layerType")
        if kind not in _MULTIPLYING:
            continue
        types = [source.get_element_type().get_type_name() for source in node.inputs()]
        integer = sum(name in INTEGER_TYPES for name in types) >= 2 or "i8" in _text(info, "primitiveType")
        kernel = f"{_text(info, 'primitiveType')} {'x'.join(sorted(set(types)))}"
        for layer in _modules(_text(info, "originalLayersNames"), kind):
            found.setdefault(layer, []).append((kernel, integer))
    return found


def _modules(names: str, kind: str) -> set[str]:
    """The planned layers among the original names of a node of the runtime graph."""
    layers = _LAYER.findall(names)
    if kind != "Subgraph" and layers:
        return set(layers[:1])  # the node may have taken in what follows
    return set(_PRODUCT.findall(names)) if kind in ("Subgraph", "MatMul") else set()


def _text(info: Mapping[str, Any], key: str) -> str:
    return str(info[key].get()) if key in info else ""
