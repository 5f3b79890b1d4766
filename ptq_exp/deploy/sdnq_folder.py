"""A quantized model as a folder of diffusers whose weights the package sdnq reads, with our own integers in it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ptq_exp import __version__
from ptq_exp.deploy.artifact import PIPELINE_FILE
from ptq_exp.deploy.integer_weights import model_inside, plain_state, plain_weight
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.deploy.saving import check_adapters
from ptq_exp.deploy.sdnq_layer import sdnq_layer
from ptq_exp.deploy.sdnq_page import page
from ptq_exp.errors import ConfigError, DataError, not_installed
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization.packed_network import packed_layers, type_name
from ptq_exp.storage.atomic import replacing_folder
from ptq_exp.storage.plain_json import read_json, to_plain, write_json

ABOUT, PAGE, WEIGHTS = "export.json", "README.md", "diffusion_pytorch_model.safetensors"
_HAS_WEIGHTS = (
    nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)
"""Layers that sdnq quantizes, if they are not left out by name."""


def check_sdnq() -> None:
    """Raise ConfigError where the package that lays out these folders is not installed."""
    if find_spec("sdnq") is None:
        raise not_installed("format=sdnq", "the package sdnq", "sdnq")


def write_sdnq(quantized: QuantizedModel, out: Path) -> dict[str, Any]:
    """Write a folder that diffusers loads with sdnq: of a pipeline all of it, otherwise the network's own.

    Integers and scales are those of the quantized network, low-rank branches become `svd_up` and `svd_down`, rotations
    of linear layers and 1x1 convolutions its Hadamard transform. Weights that sdnq has no layout for are written as
    plain ones of the same values, in the type of the network. Activations are not quantized, or dynamically by sdnq.

    Returns:
        The content of export.json: `types`, {type: number of weights}, `plain`, {layer: why it is not quantized there},
        and `distance`, {layer: relative distance of what sdnq's arithmetic makes of it}, and what else belongs to it.

    Raises:
        ConfigError: the package sdnq is not installed, the model is none of diffusers, or `out` holds other files.
        DataError: no quantized weight has a layout there.
        PTQError: a file cannot be written.
    """
    check_sdnq()
    out = Path(out)
    _check_free(out)
    inside = model_inside(quantized.network)
    if inside is None:
        raise ConfigError(f"format=sdnq: the network of {quantized.model.name} is no model of diffusers alone, which "
                          "from_pretrained could read: give format=gguf or format=comfy, files of weights by name")
    with replacing_folder(out) as folder:
        return _written(quantized, *inside, folder)


def _check_free(out: Path) -> None:
    """Raise ConfigError if `out` holds anything but an earlier export of this format, whole and without more."""
    if not out.exists():
        return
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} if out.is_dir() else {"it"}
    try:
        about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
        known = {ABOUT, *about["files"]} if about["format"] == "sdnq" else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    if found - known:
        raise ConfigError(f"out={out} holds other files: give a new folder, or that of an earlier export")


def _written(quantized: QuantizedModel, prefix: str, network: nn.Module, folder: Path) -> dict[str, Any]:
    """Write all files, and return the content of export.json."""
    record: dict[str, Any] = {}
    writing = partial(_write_component, quantized.network, prefix, network, record)
    model = quantized.model
    check_adapters(network, "the quantized network")
    if isinstance(model, PipelineModel):
        component = copy.copy(network)
        component.save_pretrained = writing
        model.pipeline_with(component).save_pretrained(folder)
    else:
        writing(folder)
    about = to_plain({
        "format": "sdnq", "model": model.name, "digest": model.digest, "class": type(network).__name__,
        "dtype": type_name(next(network.parameters())),
        "pipeline": type(model.pipeline).__name__ if isinstance(model, PipelineModel) else None,
        "component": model.component if isinstance(model, PipelineModel) else None,
        "absent": _absent(folder), "left_out": _left_out(quantized),
        "versions": {"ptq_exp": __version__, "sdnq": _version()}, **record,
    })
    (folder / PAGE).write_text(page(about), encoding="utf-8")
    about["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_json(folder / ABOUT, about)
    return about


def _write_component(
    network: nn.Module, prefix: str, component: nn.Module, record: dict[str, Any], folder: str | Path, **_: Any
) -> None:
    """Write config.json and weights of the component; stands for `ModelMixin.save_pretrained`."""
    tensors, layers, found = _tensors(network, prefix)
    record |= found
    config = json.loads(component.to_json_string())
    config.pop("_name_or_path", None)
    config["quantization_config"] = _config(component, layers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / "config.json", config)


def _tensors(network: nn.Module, prefix: str) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, Any]]:
    """Return all tensors of the component, the settings of each layer that sdnq has, and the record."""
    tensors = {name.removeprefix(prefix): value.contiguous() for name, value in plain_state(network).items()}
    layers, plain, distance, types = {}, {}, {}, Counter()
    for full_name, layer in packed_layers(network):
        name = full_name.removeprefix(prefix).removesuffix(".weight")
        made = sdnq_layer(layer)
        if isinstance(made, str):
            plain[name], tensors[f"{name}.weight"] = made, plain_weight(layer).to(layer.weight.dtype)
            types[type_name(layer.weight)] += 1
        else:
            layers[name], distance[name] = made.settings, made.distance
            types[made.settings["weights_dtype"]] += 1
            tensors |= {f"{name}.{key}": value for key, value in made.tensors.items()}
    if not layers:
        reasons = "; ".join(sorted(set(plain.values()))) or "no weight is quantized"
        raise DataError(f"format=sdnq: no quantized weight has a layout there ({reasons}): give weights integers of 8 "
                        "bits or fewer and leave out what is named, or choose format=gguf")
    return tensors, layers, {"types": dict(types), "plain": plain, "distance": distance}


def _config(component: nn.Module, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return `quantization_config`: settings of most layers for all, of the others by name, and what stays plain."""
    from sdnq import SDNQConfig

    usual = json.loads(Counter(json.dumps(settings) for settings in layers.values()).most_common(1)[0][0])
    modules = dict(component.named_modules())
    plain = [f"{name}.weight" for name, module in modules.items()
             if isinstance(module, _HAS_WEIGHTS) and name not in layers]
    config = SDNQConfig(
        **usual, add_skip_keys=False, quant_conv=any(not isinstance(modules[name], nn.Linear) for name in layers),
        modules_quant_config={f"{name}.weight": own for name, own in layers.items() if own != usual},
        modules_to_not_convert=plain,
    ).to_dict()
    return config | {"modules_to_not_convert": sorted(config["modules_to_not_convert"])}


def _absent(folder: Path) -> list[str]:
    """Name the components that a pipeline can have and this one has not."""
    index = folder / PIPELINE_FILE
    return [name for name, value in read_json(index).items() if value == [None, None]] if index.exists() else []


def _left_out(quantized: QuantizedModel) -> list[str]:
    """Name the parts of the saved model that the folder has no place for."""
    parts = {
        "the ranges of activations": any(rule.spec and rule.spec.input for rule in quantized.rules),
        "the bits of each step": quantized.schedule is not None,
        "the correction of quantization noise": quantized.statistics is not None,
    }
    return [name for name, there in parts.items() if there]


def _version() -> str:
    from sdnq import sdnq_version

    return sdnq_version
