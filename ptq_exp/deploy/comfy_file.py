"""The weights of a quantized model as a safetensors file with ComfyUI's int8 entries, rotated ones ("convrot") too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq_exp import __version__
from ptq_exp.deploy.integer_weights import integers_of, model_inside, plain_state, plain_weight, rotation_of
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import DataError
from ptq_exp.quantization.packed_network import packed_layers, type_name
from ptq_exp.storage.atomic import atomic_path

INT8 = "int8_tensorwise"
"""The format's name; scales are of the whole weight or of each output channel."""
_LOW, _HIGH = -128, 127


def write_comfy(quantized: QuantizedModel, path: Path) -> dict[str, Any]:
    """Write all parameters of the quantized network: linear layers as int8 by their own integers, others in their type.

    A linear layer NAME has `NAME.weight` int8 [out, in], `NAME.weight_scale` float32, [] or [out, 1], and
    `NAME.comfy_quant`, the bytes of a JSON object, as uint8. A weight that was rotated in regular Hadamard blocks stays
    so, `convrot`: its reader turns the inputs. What the format has no place for (convolutions, groups, low-rank
    branches, integers beyond 8 bits) is written as a plain weight. What reads such files quantizes activations itself,
    each token by a scale of its own. Names are those of the network; of a model of diffusers, those that it has there.

    Returns:
        `types`, {type: number of tensors that are parameters}, and `plain`, {layer: why it is no int8}.

    Raises:
        DataError: the network has no quantized weight that can be int8.
        PTQError: the file cannot be written.
    """
    network = quantized.network
    inside = model_inside(network)
    prefix = inside[0] if inside else ""
    tensors: dict[str, Tensor] = plain_state(network)
    types: dict[str, int] = {}
    plain: dict[str, str] = {}
    for name, layer in packed_layers(network):
        entries = _entries(layer)
        if isinstance(entries, str):
            plain[name.removesuffix(".weight").removeprefix(prefix)] = entries
            tensors[name] = plain_weight(layer).to(layer.weight.dtype)
        else:
            tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in entries.items()}
    for name, _ in network.named_parameters():
        kind = type_name(tensors[name])
        types[kind] = types.get(kind, 0) + 1
    if "int8" not in types:
        reasons = "; ".join(sorted(set(plain.values()))) or "no weight is quantized"
        raise DataError(f"format=comfy: the network has no weight for int8 ({reasons}): quantize it with "
                        "quantization.weight_symmetric=true, quantization.weight_granularity=channel, 8 bits or fewer, "
                        "and of quantization.transforms rotate alone")
    about = {"format": "pt", "ptq_exp": __version__, "model": quantized.model.name, "digest": quantized.model.digest}
    with atomic_path(path) as temporary:
        save_file({name.removeprefix(prefix): value.contiguous() for name, value in tensors.items()}, temporary, about)
    return {"types": types, "plain": plain}


def _entries(layer: nn.Module) -> dict[str, Tensor] | str:
    """Return the tensors of a layer, or why it has no int8 weight."""
    if layer.weight.ndim > 2:
        return "convolutions have no int8 weights there"
    rotation = rotation_of(layer)
    if isinstance(rotation, str):
        return rotation
    if getattr(layer, "branch", None) is not None:
        return f"it has a {layer.branch.meaning}"
    found = integers_of(layer)
    if isinstance(found, str):
        return found
    if found.scale.shape[1] > 1:
        return "it has scales for groups of input channels"
    if not _LOW <= int(found.levels.min()) <= int(found.levels.max()) <= _HIGH:
        return f"its integers are not all in {_LOW}..{_HIGH}, as those of 7 bits are"
    one = found.per_tensor and rotation is None  # rotated weights have a scale for each output channel
    about = {"format": INT8} | ({} if rotation is None else {"convrot": True, "convrot_groupsize": rotation})
    return {
        "weight": found.levels.to(torch.int8), "weight_scale": found.scale[0, 0].clone() if one else found.scale,
        "comfy_quant": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8),
    }
