"""A quantized model as files: a folder of its own, or the component's folder in a whole pipeline of diffusers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from ptq_exp.deploy.arguments import ARGUMENTS_FILE, to_json
from ptq_exp.deploy.artifact import SCHEDULE_FILE, STATISTICS_FILE, grid_entry
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines import PipelineModel, PipelineNetwork
from ptq_exp.pipelines.adapters import adapters_of
from ptq_exp.quantization.save import (
    COMPONENT_TENSORS_FILE,
    DESCRIPTION_FILE,
    TENSORS_FILE,
    save_quantized,
)
from ptq_exp.storage.atomic import atomic_path, file_digest
from ptq_exp.storage.plain_json import to_plain

if TYPE_CHECKING:
    from ptq_exp.deploy.quantized_model import QuantizedModel

QUANT_METHOD = "ptq_exp"
"""What config.json of a component names as its quantization method."""
_WEIGHTS = ("diffusion_pytorch_model", "pytorch_model", "model")


def save_model(quantized: QuantizedModel, folder: Path) -> dict[str, Any]:
    """Write the files of a quantized model into `folder`; returns the content of quantization.json.

    Raises:
        ConfigError: nobody knows what the model was made from, or it has adapters or arguments that cannot be saved.
        PTQError: a file cannot be written.
    """
    return _save_files(quantized, folder, TENSORS_FILE)


def save_pipeline(quantized: QuantizedModel, folder: Path) -> dict[str, Any]:
    """Write a folder that `DiffusionPipeline.from_pretrained` reads; returns the content of quantization.json.

    Raises:
        ConfigError: see `save_model`; or the folder holds another model.
    """
    name = quantized.model.component
    for other, component in quantized.pipeline.components.items():
        if other != name and isinstance(component, nn.Module):
            check_adapters(component, other)
    quantized.pipeline.save_pretrained(folder)
    return json.loads((folder / name / DESCRIPTION_FILE).read_text(encoding="utf-8"))


def save_component(quantized: QuantizedModel, folder: str | Path, **_: Any) -> None:
    """Write the folder of a quantized component: config.json that names the method, packed weights, description.

    Stands for `ModelMixin.save_pretrained` and takes its further arguments, which ask for what is done anyway.

    Raises:
        ConfigError: see `save_model`; or the folder holds another model.
    """
    folder = Path(folder)
    component = quantized.network.component
    if not callable(getattr(component, "to_json_string", None)):
        raise ConfigError(f"{type(component).__name__} is no model of diffusers: it has no config.json to be saved in")
    if not (folder / DESCRIPTION_FILE).exists():
        for path in sorted(folder.glob("*")):
            if path.name.startswith(_WEIGHTS):
                raise ConfigError(f"{path} holds the weights of another model: choose another folder")
    description = _save_files(quantized, folder, COMPONENT_TENSORS_FILE)
    config = json.loads(component.to_json_string())
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD, "bits": description["settings"]["bits"]["name"],
        "dtype": description["network"]["dtype"], "format_version": description["version"],
    }
    config.pop("_name_or_path", None)
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_files(quantized: QuantizedModel, folder: Path, tensors_file: str) -> dict[str, Any]:
    if not quantized.recipe:
        raise ConfigError(f"the quantized {quantized.model.name} has no recipe: only what a run has made can be saved")
    about = {
        **{key: value for key, value in quantized.recipe.items() if key != "pipeline"},
        "grid": grid_entry(quantized.grid, quantized.guidance_scale),
        "activation_widths": list(quantized.widths), "transforms": [done.to_dict() for done in quantized.transforms],
    }
    for key, name, part in (
        ("bit_schedule", SCHEDULE_FILE, quantized.schedule), ("noise_statistics", STATISTICS_FILE, quantized.statistics)
    ):
        about[key] = None
        if part is not None:
            part.save(folder / name)
            about[key] = _file_entry(folder / name)
    if isinstance(quantized.network, PipelineNetwork):
        about |= _calls(quantized, folder)
    return save_quantized(
        folder, quantized.network, quantized.rules, quantized.report, to_plain(about), tensors_file,
        prefix="component." if isinstance(quantized.network, PipelineNetwork) else "",
    )


def _calls(quantized: QuantizedModel, folder: Path) -> dict[str, Any]:
    """Describe how the network is called, and the pipeline that calls it; tensors go into a file beside."""
    component, tensors = quantized.network.component, {}
    check_adapters(component, "the quantized network")
    example = quantized.network.layout.arguments(*quantized.model.example_inputs())
    entries = {"network": _network(component), "example": to_json(example, "example", tensors)}
    pipeline = _pipeline(quantized.model) if isinstance(quantized.model, PipelineModel) else None
    pipeline = quantized.recipe.get("pipeline") if pipeline is None else pipeline
    entries["pipeline"] = None if pipeline is None else to_json(pipeline, "pipeline", tensors)
    path = folder / ARGUMENTS_FILE
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return entries | {"arguments": _file_entry(path)}


def _network(component: nn.Module) -> dict[str, Any]:
    """Name the class of a component, the type of its parameters, and those that have another."""
    types = {name: str(value.dtype).removeprefix("torch.") for name, value in component.named_parameters()}
    sizes = Counter()
    for name, value in component.named_parameters():
        sizes[types[name]] += value.numel()
    usual = sizes.most_common(1)[0][0]
    others = {name: kind for name, kind in types.items() if kind != usual}
    return {"class": type(component).__name__, "dtype": usual, "other_dtypes": others}


def _pipeline(model: PipelineModel) -> dict[str, Any]:
    """Return the arguments that make the same `PipelineModel` of the same pipeline."""
    networks = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    dtypes = {name: part.dtype for name, part in networks.items() if hasattr(part, "dtype")}
    return {
        "class": type(model.pipeline).__name__, "component": model.component, "dtypes": dtypes,
        "requests": list(model.requests), "call": dict(model.call), "steps": model.steps,
    }


def check_adapters(component: nn.Module, who: str) -> None:
    """Raise ConfigError if `component` has LoRA adapters, which are no part of what is saved."""
    if names := adapters_of(component):
        raise ConfigError(
            f"{who} has the LoRA adapters {', '.join(names)}: call unload_lora_weights() before it is saved, and load "
            "them again afterwards"
        )


def _file_entry(path: Path) -> Mapping[str, str]:
    return {"file": path.name, "sha256": file_digest(path)}
