"""What a reconstruction changes in a network, as a whole: to be kept, and given to another copy of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq_exp.errors import DataError
from ptq_exp.quantization import ActivationQuantizer, WeightQuantizer


def learned_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map names to the quantized weights of `network` and the step sizes of its activations, which are not copied."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, ActivationQuantizer):
            found[f"{name}.scale"] = module.scale
    return found


@torch.no_grad()
def put_learned_(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a calibrated `network` what `learned_tensors` returned of another copy of it.

    Raises:
        DataError: the tensors are those of another network; it is left unchanged.
    """
    learned = learned_tensors(network)
    wrong = sorted(set(learned) ^ set(tensors)) or [
        name for name, tensor in learned.items() if tensors[name].shape != tensor.shape
    ]
    if wrong:
        raise DataError(f"the stored reconstruction belongs to another network: {', '.join(wrong[:3])} do not fit")
    for name, tensor in learned.items():
        tensor.copy_(tensors[name])
