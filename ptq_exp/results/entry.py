"""`Entry`: what is said of one entry of results.json, and the words for the runs that have it."""

from __future__ import annotations

from dataclasses import dataclass

QUANTIZED = "quantized runs"
SCORED = "runs that score images (`evaluation.extractor`)"
CORRECTED = "runs with a correction"
EXECUTED = "runs with an engine (`runtime=openvino`, `runtime.compare`)"
CHOSEN = "runs with a budget (`bits=auto`)"
GATED = "runs with `evaluation.gate`"
FORECAST = "runs of a minute and more that can be forecast: one device, no `bits=auto`, no engine that draws"


@dataclass(frozen=True)
class Entry:
    """One entry of results.json.

    Attributes:
        key: dotted; `*` stands for any name.
        meaning: one line.
        unit: of the number, or what kind of value it is.
        where: the function that computes it, dotted below `ptq_exp`.
        when: in which runs it is there; "" = in all that finished.
    """

    key: str
    meaning: str
    unit: str
    where: str
    when: str = ""
