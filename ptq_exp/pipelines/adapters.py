"""LoRA adapters (peft) in a network: found, and taken out where they are fused into the weights."""

from __future__ import annotations

import copy
import sys

from torch import nn

from ptq_exp.errors import ConfigError


def adapters_of(network: nn.Module) -> list[str]:
    """Return the names of the adapters that layers of `network` have."""
    kind = _wrapper()
    layers = () if kind is None else (module for module in network.modules() if isinstance(module, kind))
    return sorted({name for layer in layers for name in _names(layer)})


def without_fused(network: nn.Module, who: str) -> nn.Module:
    """Return `network` without wrappers of adapters that are fused into its weights; `network` itself stays.

    Parameters are shared; modules that hold no wrapper are, too.

    Args:
        who: names the network in messages.

    Raises:
        ConfigError: an adapter is not fused.
    """
    kind = _wrapper()
    return network if kind is None else _bare(network, kind, who)


def _wrapper() -> type | None:
    """Return the class of layers with adapters; None where peft was never imported, so that there can be none."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def _names(layer: nn.Module) -> set[str]:
    """Return the names of the adapters that one wrapped layer has."""
    return {str(name) for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


def _bare(module: nn.Module, wrapper: type, who: str) -> nn.Module:
    if isinstance(module, wrapper):
        loose = set(module.active_adapters) & _names(module) - set(module.merged_adapters)
        if loose and not module.disable_adapters:
            raise ConfigError(
                f"{who} has the LoRA adapter {min(loose)}, which is not part of its "
                "weights: fuse it first (pipe.fuse_lora(); pipe.unload_lora_weights()), or quantize without it and "
                "load it onto the quantized pipeline"
            )
        return module.get_base_layer()
    bare = {name: None if child is None else _bare(child, wrapper, who) for name, child in module._modules.items()}
    if all(bare[name] is child for name, child in module._modules.items()):
        return module
    found = copy.copy(module)
    found._modules = bare
    if getattr(found, "_hf_peft_config_loaded", False):
        found._hf_peft_config_loaded = False
        found.__dict__.pop("peft_config", None)
    return found
