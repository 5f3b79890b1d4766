"""Declare the settings of where and how a run is executed: devices, threads, memory, and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptq_exp.settings.field import setting


@dataclass
class TrainerConfig:
    """Where the Lightning Trainer runs."""

    accelerator: str = setting("auto", "`auto`, `cpu`, `gpu`, or another of Lightning's accelerators.")
    devices: int = setting(1, "Devices that the run uses.", low=1, high=1024)
    strategy: str = setting("auto", "Lightning's strategy for several devices.")
    progress_bar: bool = setting(True, "Show progress bars.")
    threads: int | None = setting(
        None, "CPU threads; null: as many as cores are free while the run starts (OMP_NUM_THREADS, where it is set), "
        "or the share of one job where several run at once.",
        low=1, high=4096,
    )
    cuda_graph: bool = setting(
        False, "Record an evaluation of the network as a CUDA graph, and replay it in every sampling step; needs a GPU."
    )
    max_memory_gb: float | None = setting(
        None, "Quantize a network block by block, with weights and states on disk, where two copies of its weights are "
        "larger than so many GB; the result is the same. null: in memory.", low=0,
    )


@dataclass
class RuntimeConfig:
    """How the quantized network is executed when it is sampled; see `ptq_exp.runtime`."""

    name: str = setting("simulate", "What executes the quantized network.", choices="ptq_exp.runtime.base.RUNTIMES")
    precision: str = setting(
        "f32", "Type of what the engine does not execute as integers.", choices=("f32", "bf16")
    )
    weights: str = setting(
        "as_saved", "Execute the saved weights; or re-grid them to 7 bits, for CPUs whose 8-bit sums saturate; or let "
        "linear layers keep 4-bit groups, whose inputs OpenVINO quantizes itself (groups).",
        choices=("as_saved", "7bit", "groups"),
    )
    regrid: bool = setting(False, "Quantize weights with several scales per output channel anew, 8 bits per channel.")
    compare: str | None = setting(
        None, "Engine that the simulation is compared with after the scores; null: none. An engine that draws the "
        "images is compared always.", choices="ptq_exp.runtime.base.RUNTIMES",
    )
    measure: int = setting(
        5, "Turns in which an engine is timed after the scores, beside full precision and the simulation; 0: nothing "
        "is measured.", low=0, high=1000,
    )
    measure_seconds: float = setting(
        8.0, "No turn begins after this time, and the simulation draws no longer to be compared.", low=0
    )
    measure_memory: bool = setting(
        False, "Also measure the peak memory of processes that evaluate the network and do nothing else."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options of the runtime; the simulation has none."""
        return {} if self.name == "simulate" else self.engine_options

    @property
    def engine(self) -> str | None:
        """The engine that is measured; None = none is."""
        return self.compare if self.name == "simulate" else self.name

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options of the engine, whether it draws the images or is compared with what does."""
        return {"precision": self.precision, "weights": self.weights, "regrid": self.regrid}
