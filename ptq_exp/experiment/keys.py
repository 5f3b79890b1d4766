"""What identifies each thing that runs share: all settings that decide it, and the version of how it is computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ptq_exp.correction import BitSchedule
from ptq_exp.deploy.artifact import Artifact
from ptq_exp.diffusion import DiffusionModel, TimeGrid
from ptq_exp.evaluation import content_digest
from ptq_exp.experiment.plan import activation_widths, bit_groups
from ptq_exp.experiment.run import needs_images
from ptq_exp.quantization import Transform, transforms_of
from ptq_exp.results.environment import processor
from ptq_exp.runtime import runtime_of
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.storage.atomic import file_digest

VERSIONS = {
    "sampling": 1, "calibration": 2, "transform": 1, "ranges": 1, "reconstruction": 1, "noise": 1, "propagation": 1,
    "schedule": 1, "correction": 1, "images": 1, "features": 1, "reference": 1, "activations": 1, "sensitivity": 1,
    "trajectory": 2, "solution": 1, "quantized_images": 1,
    "float64": 1,  # weights of folders, which were rounded to float32 on their way when keys did not name this
}
"""Raise a kind's number when its values change while the settings stay: what was stored is computed anew then.

A key holds the numbers of all kinds that its artefact is made of: other ranges mean another quantized network.
"""
Key = dict[str, Any]
_CHOOSE_KERNELS = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "NVIDIA_TF32_OVERRIDE",
)
"""Environment variables by which oneDNN, MKL and CUDA take other kernels on the same processor."""


def versioned(kind: str, key: Mapping[str, Any]) -> Key:
    """`key` with the version of `kind` beside those that it has already."""
    return {**key, "versions": key.get("versions", {}) | {kind: VERSIONS[kind]}}


def joined(*keys: Mapping[str, Any]) -> Key:
    """All of several keys, with the versions of all of them."""
    versions = {kind: number for key in keys for kind, number in key.get("versions", {}).items()}
    return {name: value for key in keys for name, value in key.items()} | {"versions": versions}


@dataclass(frozen=True)
class Keys:
    """The keys of one experiment.

    Attributes:
        saved: the saved quantized model that is evaluated; None = one is made from the settings.
    """

    config: ExperimentConfig
    model: DiffusionModel
    grid: TimeGrid
    guidance_scale: float
    saved: Artifact | None = None

    def sampling(self) -> Key:
        """All that decides a full-precision trajectory of a given sample index."""
        model = self.config.model
        key = versioned("sampling", {
            "model": self.model.digest,
            "dtype": model.dtype,
            "layout": [model.channels_last, model.compile],
            "sampler": self.grid.solver,
            "grid": [self.grid.timesteps.tolist(), self.grid.alphas_cumprod.tolist(), self.grid.eta],
            "guidance_scale": self.guidance_scale,
            "seed": self.config.seed,
        } | self.model.drawing)
        return versioned("float64", key) if model.dtype == "float64" else key

    def images(self) -> Key:
        """All that decides the full-precision images."""
        evaluation = self.config.evaluation
        return versioned("images", self.sampling()) | {
            "n_samples": evaluation.n_samples, "batch_size": evaluation.batch_size
        }

    def calibration(self, calibration_round: int) -> Key:
        """All that decides the calibration set of a round, from 1; later ones also depend on the quantized network."""
        calibration = asdict(self.config.calibration) | {"rounds": calibration_round}
        key = versioned("calibration", self.sampling()) | {"calibration": calibration}
        if calibration_round > 1:
            key = versioned("ranges", key) | self._quantizers()
        if not needs_images(self.config.calibration):
            return key
        images = self.config.model.images or {}
        # a folder may hold other images tomorrow: its content decides, not its name
        content = content_digest(images["path"]) if images.get("path") else None
        return key | {"images": images, "content": content}

    def transform(self, calibration_round: int, transforms: list[Transform]) -> Key:
        """All that decides what is fitted for the last of `transforms`."""
        key = self.calibration(calibration_round)
        if any(transform.uses_rules for transform in transforms):
            key = key | self._quantizers()
        return versioned("transform", key) | {"transforms": [transform.to_dict() for transform in transforms]}

    def ranges(self, calibration_round: int | None = None) -> Key:
        """All that decides the ranges of the quantized network, for all activation widths that it can run at.

        None = those of the last round of calibration.
        """
        if calibration_round is None:
            calibration_round = self.config.calibration.rounds
        key = versioned("ranges", self.calibration(calibration_round)) | self._quantizers()
        return versioned("transform", key) if self.config.quantization.transforms else key

    def quantization(self) -> Key:
        """All that decides the quantized network: its ranges and, where there is one, its reconstruction."""
        if self.saved is not None:
            # what was saved decides, not what would be made of the same settings here
            return self.sampling() | {"quantized": self.saved.digest}
        if not self.config.reconstruction.active:
            return self.ranges()
        settings = asdict(self.config.reconstruction)
        del settings["cache_gb"]  # where rows lie changes nothing
        of_gptq = {name: settings.pop(name) for name in ("method", "act_order", "damping", "hessian_gb")}
        if of_gptq["method"] == "gptq":
            settings = of_gptq | {"name": settings["name"], "granularity": settings["granularity"]}
        settings["blocks"] = list(self.model.blocks) if settings["granularity"] == "block" else []
        return versioned("reconstruction", self.ranges()) | {"reconstruction": settings}

    def scheduled(self, schedule: BitSchedule | None) -> Key:
        """All that decides what the quantized network answers at the widths of each step, uncorrected."""
        key = self.quantization() | {"schedule": schedule and list(schedule.activation)}
        return key if schedule is None else versioned("schedule", key)

    def estimates(self, schedule: BitSchedule | None, corrected: bool) -> Key:
        """All that decides the noise estimates that images are drawn with."""
        scheduled = self.scheduled(schedule) | {"runtime": self.config.runtime.name, **self.config.runtime.options}
        if not corrected:
            return scheduled | {"correction": None}
        correction = asdict(self.config.correction)
        if correction["fit"] == "estimates":
            del correction["fit"]  # what was made before there was a choice is still that
        if correction["statistics"]:
            correction["statistics"] = file_digest(correction["statistics"])
        if correction.get("fit") == "trajectory":
            scheduled = versioned("trajectory", scheduled)
        return versioned("correction", scheduled) | {"correction": correction}

    def quantized_images(self, schedule: BitSchedule | None, corrected: bool, device: torch.device) -> Key:
        """All that decides the images of the quantized model, and what computes them on `device`.

        Rounding makes a whole level of what differs in the last bit: other libraries, processors or threads give other
        images, as good as these, and draw their own. What a killed run has drawn is continued by any of them.
        """
        key = joined(self.images(), self.estimates(schedule, corrected))
        return versioned("quantized_images", key) | {"drawn_by": drawn_by(self.config, device)}

    def _quantizers(self) -> Key:
        bits, settings = asdict(self.config.bits), self.config
        # with the defaults of what is not given
        transforms = [transform.to_dict() for transform in transforms_of(settings.quantization.transforms)]
        quantization = asdict(settings.quantization)
        if quantization["activation"] == "static":
            del quantization["activation"]
        if settings.quantization.activation != "dynamic_group":
            del quantization["activation_group_size"]
        widths = {key: bits[key] for key in ("weight", "softmax", "first_last", "boundary")}
        groups = bit_groups(settings.bits, settings.model.groups)
        return {
            "metric": settings.metric.name,
            "bits": widths | {"activation": activation_widths(settings.bits, self.grid)},
            "quantization": quantization | {"transforms": transforms},
            "groups": list(groups.values()),
        }


def drawn_by(config: ExperimentConfig, device: torch.device) -> Key:
    """Name what executes a quantized network here: library, processor, threads, device, engine."""
    found: Key = {
        "torch": torch.__version__, "processor": processor(), "vectors": torch.backends.cpu.get_cpu_capability(),
        "kernels": {name: os.environ[name] for name in _CHOOSE_KERNELS if name in os.environ},
        "threads": torch.get_num_threads(), "device": device.type, "cuda_graph": config.trainer.cuda_graph,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    if config.runtime.name != "simulate":
        engine = runtime_of(config.runtime.name, config.runtime.options)
        found["engine"] = getattr(engine, "version", torch.__version__)
    return found
