"""Declare the settings of the method: calibration, range metric, bits, quantization, reconstruction, correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptq_exp.settings.field import setting

NAME = "Name of the choice, by which runs and tables mention it."


@dataclass
class CalibrationConfig:
    """On which states of the sampler activation ranges are chosen."""

    name: str = setting("", NAME)
    source: str | None = setting(
        None, "Where states come from: denoising runs, diffused real images, raw images, or noise.",
        choices="ptq_exp.calibration.SOURCES",
    )
    distribution: dict[str, Any] | None = setting(
        None, "Distribution of the states over the sampling steps: a class with `draw`, and its arguments."
    )
    n_samples: int = setting(0, "States in the calibration set.", low=1)
    batch_size: int = setting(0, "States per network evaluation while ranges are observed.", low=1)
    steps_per_sample: int = setting(
        1, "Of a pipeline: steps in which the calls of each trajectory are recorded.", low=1
    )
    rounds: int = setting(
        1, "Calibrations in a row; every later one takes states of the model that the one before quantized.", low=1
    )
    labels: str = setting(
        "paired", "Time each state is shown with: its own, or the mismatch of PTQ4DM's published code.",
        choices="ptq_exp.calibration.LABELS",
    )


@dataclass
class MetricConfig:
    """Error measure of the range search."""

    name: str = setting("", "Range metric: the error that the range search minimises.",
                        choices="ptq_exp.quantization.METRICS")


@dataclass
class BitsConfig:
    """Bit-widths; all null for full precision.

    With a `schedule`, activations have a width per sampling step and `activation` is null.
    """

    name: str = setting("", NAME)
    weight: int | str | None = setting(None, "Width of weights, or a number format such as `mxfp4`.", low=2, high=8)
    activation: int | str | None = setting(
        None, "Width of the activations that layers read, and of q, k and v, or a number format; 16: no activation is "
        "quantized; null with a schedule.", low=2, high=8
    )
    softmax: int | None = setting(None, "Width of the attention map behind the softmax.", low=2, high=16)
    first_last: int | None = setting(
        None, "Least width of weights and activations in the first and the last layer.", low=2, high=8
    )
    boundary: int | None = setting(
        None, "Width of the activations that enter the first layer (x_t) and the last one.", low=2, high=16
    )
    schedule: Any = setting(
        None, "Activation width per sampling step: `snr` or `budget` (rules), a list of one width per step, noisiest "
        "first, or a `bit_schedule.json`.", path=True,
    )
    candidates: list[Any] | None = setting(
        None, "Widths that the schedule chooses from; null: those that a given schedule holds. With a budget: what "
        "each layer may get, such as `w4a8`."
    )
    budget: dict[str, Any] = setting(
        dict, "With bits=auto: most megabytes (10^6) of weights `size_mb`, least BOPs of FP32 over those of "
        "convolutions and linear layers `bops_ratio`, most milliseconds `latency_ms` of one evaluation on the runtime."
    )
    sensitivity_samples: int = setting(
        8, "With a budget: trajectories on which the error of each group of layers is measured.", low=1
    )
    sensitivity_steps: int = setting(
        10, "With a budget: steps of these trajectories, evenly spread; no more than there are.", low=1
    )
    solutions: int = setting(
        4, "With a budget: best solutions that are measured on whole trajectories, beside one candidate for all "
        "layers where it is within the budget.", low=1
    )
    solution_samples: int = setting(16, "With a budget: trajectories for that.", low=1)
    bops_ratio: float | None = setting(
        None, "With schedule=budget: BOPs of FP32 over BOPs of the schedule, of convolutions and linear layers."
    )
    gain_steps: int = setting(
        20, "With schedule=budget: steps whose effect on the final state is measured; those between are interpolated."
    )
    gain_samples: int = setting(64, "With schedule=budget: trajectories that the effect is measured on.")
    groups: dict[str, Any] = setting(
        dict, "Widths such as `w4a8`, number formats such as `mxfp4`, or one for each (`nvfp4:8`) for groups of "
        "layers, by a name in `model.groups` or a glob; null: as all others."
    )
    min_bops_ratio: float | None = setting(
        None, "Configurations with more BOPs than FP32 / this end before anything is computed."
    )

    @property
    def limits(self) -> dict[str, float]:
        """The budgets that are set; without any, nothing is chosen."""
        return {name: value for name, value in self.budget.items() if value is not None}


@dataclass
class ReconstructionConfig:
    """How weights are rounded, where not to the nearest level, and how activation step sizes are learned."""

    name: str = setting("", NAME)
    granularity: str = setting(
        "none", "Take the blocks that the model names as one piece each, every layer by itself, or nothing.",
        choices=("block", "layer", "none"),
    )
    method: str = setting(
        "learned", "Learn roundings by an optimiser, or compute them by GPTQ, column by column; settings of the other "
        "one have no effect.", choices=("learned", "gptq"),
    )
    act_order: bool = setting(
        True, "GPTQ: round columns of inputs with much energy first; the grids are those of the original weights, so "
        "that nothing has to be stored for it.",
    )
    damping: float = setting(
        0.01, "GPTQ: share of the mean of the Hessian's diagonal that is added to it; raised where that is too little.",
        low=0, high=1,
    )
    hessian_gb: float = setting(
        2.0, "GPTQ: layers whose Hessian (the square of in-channels times kernel, 8 bytes each) takes more GB keep "
        "their nearest rounding, as the log and reconstruction.json say.", low=0,
    )
    iterations: int = setting(0, "Optimiser steps per block; the papers take 20000.", low=1)
    batch_size: int = setting(0, "Samples per iteration.", low=1)
    lr: float = setting(0.0, "Adam's learning rate of the rounding variables.", low=0)
    step_lr: float = setting(
        0.0, "Learning rate of activation step sizes, relative to the calibrated ones, falling as a cosine; 0: fixed.",
        low=0,
    )
    weight: float = setting(0.0, "Weight of the regulariser that makes roundings binary.", low=0)
    warmup: float = setting(0.0, "Share of the iterations without the regulariser.", low=0, high=0.99)
    b_start: float = setting(0.0, "Exponent of the regulariser when it sets in; it falls linearly to b_end.", low=0)
    b_end: float = setting(0.0, "Exponent of the regulariser at the end.", low=0)
    power: float = setting(2.0, "Power of the errors in the loss.", low=1)
    input_prob: float = setting(
        1.0, "Probability that an input element comes from the quantized predecessors, not from full precision.",
        low=0, high=1,
    )
    drop_prob: float = setting(
        0.0, "Probability that a quantized activation element stays in full precision (QDrop).", low=0, high=1
    )
    inner_weight: float = setting(
        0.0, "Weight of the output losses of the layers inside a block (EDA-DM takes 0.8).", low=0
    )
    precision: str = setting(
        "f32", "Type of the multiplications while roundings of a network in float32 are learned; bf16 is faster on "
        "GPUs and on processors that multiply it (AVX512-BF16, AMX), and slower on others.", choices=("f32", "bf16"),
    )
    cache_gb: float = setting(
        0.0,
        "Memory in GB for inputs and outputs of a block; what does not fit goes to files under cache_dir. Up to half "
        "of it holds what finished blocks answer, and the rest targets of inner losses, where they fit.",
        low=0,
    )

    @property
    def active(self) -> bool:
        """Whether anything is reconstructed."""
        return self.granularity != "none"


@dataclass
class CorrectionConfig:
    """Which parts of the quantization noise eps_q - eps = k eps + bias + residual are corrected (PTQD)."""

    name: str = setting("", NAME)
    correlation: bool = setting(False, "Divide eps_q by 1 + k.")
    bias: bool = setting(False, "Subtract the mean error of each channel.")
    variance: bool = setting(
        False, "Let the sampler add less noise of its own, by the variance of the residual (eta > 0)."
    )
    convention: str = setting(
        "paper", "Statistics and step as PTQD derives them, or as its published code computes them.",
        choices="ptq_exp.correction.statistics.CONVENTIONS",
    )
    shrink: bool = setting(True, "Pull slopes and biases towards 0 as far as they are not significant (paper alone).")
    fit: str = setting(
        "estimates", "Fit each step to the errors of its estimates (PTQD), or step after step to the states that the "
        "corrected model reaches, keeping of nothing, bias and all parts what serves other trajectories (trajectory).",
        choices=("estimates", "trajectory"),
    )
    follow: str = setting(
        "fp32", "Trajectories on which the noise is measured: those of the fp32 or of the quantized model.",
        choices="ptq_exp.diffusion.paired.FOLLOW",
    )
    n_samples: int = setting(0, "Trajectories that the statistics are fitted on, apart from those scored.", low=2)
    batch_size: int = setting(0, "Trajectories side by side.", low=1)
    statistics: str | None = setting(
        None, "A noise_statistics.npz of another run of the same model, bits and sampler; null: fit.", path=True
    )

    @property
    def active(self) -> bool:
        """Whether anything is corrected."""
        return self.correlation or self.bias or self.variance
