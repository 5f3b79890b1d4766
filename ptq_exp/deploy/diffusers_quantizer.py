"""`quant_method: ptq_exp` in the config.json of a component: how `from_pretrained` of diffusers loads it.

Imported while diffusers is, so that all that needs more of diffusers is imported later.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ptq_exp.errors import ConfigError, DataError, PTQError

log = logging.getLogger("ptq_exp")


class Method(StrEnum):
    """The name of the method, in the form in which diffusers names its own."""

    PTQ_EXP = "ptq_exp"


class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of config.json; what decides the network is in quantization.json.

    Args:
        dtype: type of the parameters that are not quantized.
        others: bits and version, to be read by people.
    """

    def __init__(self, quant_method: str = Method.PTQ_EXP, dtype: str = "float32", **others: Any) -> None:
        self.quant_method, self.dtype = Method(quant_method), dtype
        for name, value in others.items():
            setattr(self, name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all entries: none has a default that could be left out."""
        return self.to_dict()


class PackedQuantizer(DiffusersQuantizer):
    """Builds the quantized network of a component from the files in its folder, without full-precision weights.

    Attributes:
        quantized: the `QuantizedModel` of the loaded component.
    """

    required_packages = ("accelerate",)

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantized: Any = None
        self._folder: Path | None = None
        self._device: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ConfigError where only `ptq_exp.quantize` could make what is asked for."""
        if not self.pre_quantized:
            raise ConfigError(
                "quantization_config: ptq_exp quantizes what it was calibrated on: call ptq_exp.quantize(pipeline, ...)"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the type that the network was quantized in.

        Raises:
            ConfigError: another one is asked for.
        """
        name = self.quantization_config.dtype
        saved = getattr(torch, str(name), None)
        if not isinstance(saved, torch.dtype):
            raise DataError(f"config.json: quantization_config.dtype={name} is no type of torch")
        if torch_dtype not in (None, saved):
            raise ConfigError(
                f"torch_dtype={torch_dtype}: the network was quantized in {saved}; give torch_dtype={saved}, or "
                "quantize the pipeline in the other type"
            )
        if torch_dtype is None and saved != torch.float32:
            log.warning("the network was quantized in %s: give torch_dtype=%s for the other components", saved, saved)
        return saved

    def update_device_map(self, device_map: Any) -> None:
        """Remember one device for all of the network: it is there once it is loaded.

        Raises:
            ConfigError: several devices, or a choice of them.
        """
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map} - {None}
        if len(devices) > 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
            raise ConfigError(
                f"device_map={device_map}: a quantized network is on one device; leave it out and call pipe.to(device)"
            )
        self._device = next(iter(devices), None)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the folder, and expect none of the network's own parameters in its file."""
        del loaded_keys
        self._folder = Path(checkpoint_files[0]).parent
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return {}: packed tensors are read when the network is complete."""
        del state_dict
        return {}

    def update_missing_keys(self, model: torch.nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Return []: everything comes from the packed file."""
        del model, missing_keys, prefix
        return []

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        return model

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        import copy

        from ptq_exp.deploy.component import loaded_component

        if self._folder is None:
            raise ConfigError("diffusers before 0.39 does not say where a model lies: pip install -U diffusers")
        try:
            model.eval()
            self.quantized = loaded_component(copy.copy(model), self._folder)
        except PTQError as error:
            raise type(error)(str(error).removeprefix("quantized=")) from error
        answering = self.quantized.component
        model.forward, model.save_pretrained = answering.forward, answering.save_pretrained
        return model if self._device is None else model.to(self._device)

    @property
    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: the packed files are written again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether weights can be trained: they are integers."""
        return False


def add_to(tables: ModuleType) -> None:
    """Add the method to the tables of `diffusers.quantizers.auto`."""
    tables.AUTO_QUANTIZER_MAPPING[Method.PTQ_EXP.value] = PackedQuantizer
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.PTQ_EXP.value] = PackedConfig
