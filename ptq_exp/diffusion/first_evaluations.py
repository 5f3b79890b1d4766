"""Two evaluations of a network before any image is drawn: NaN and overflow are found at once, and where they begin."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call
from ptq_exp.diffusion.model import DiffusionModel
from ptq_exp.diffusion.time_grid import TimeGrid
from ptq_exp.errors import CheckpointError, ConfigError
from ptq_exp.storage.finite import is_finite


@torch.no_grad()
def check_network(
    model: DiffusionModel, grid: TimeGrid, seed: int, device: torch.device | str = "cpu", checkpoint: str | None = None
) -> None:
    """Nothing, if the network gives finite numbers for sample 0 of `seed`; see `DiffusionModel.check_calls`.

    Args:
        checkpoint: that the model was read from, for the message.

    Raises:
        ConfigError: numbers of 16 bits do not do; the message names model.dtype, the time and the first layer.
        CheckpointError: float32 or float64 gives NaN or infinity, too.
    """
    network = model.denoiser
    home = next((parameter.device for parameter in network.parameters()), torch.device(device))
    network.to(device)
    for call in model.check_calls(grid, seed, device):
        if not is_finite(call.evaluate(network)):
            dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
            raise _error(dtype, checkpoint, f"at time {float(call.t[0]):g}, first {first_not_finite(network, call)}")
    network.to(home)


def _error(dtype: torch.dtype, checkpoint: str | None, where: str) -> ConfigError | CheckpointError:
    if remedy := wider(dtype):
        name = str(dtype).removeprefix("torch.")
        return ConfigError(f"model.dtype={name}: the network gives NaN or infinity {where}; {remedy}")
    return CheckpointError(
        f"model.checkpoint={checkpoint}: the network gives NaN or infinity {where}; its weights do not fit it, or are "
        "damaged: give another file"
    )


def wider(dtype: torch.dtype) -> str:
    """Return what to set where numbers of `dtype` do not do; nothing for float32 and float64."""
    return {
        torch.float16: "set model.dtype=bfloat16 or float32", torch.bfloat16: "set model.dtype=float32",
    }.get(dtype, "")


def first_not_finite(network: nn.Module, call: Call) -> str:
    """Where, on the way through `network`, the first NaN or infinity is: "in the output of LAYER"."""
    found: list[str] = []

    def look(what: str):
        def hook(module: nn.Module, values: tuple, *result) -> None:
            for value in result or values:
                if isinstance(value, Tensor) and not is_finite(value):
                    found.append(what)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            if next(module.children(), None) is None and name:  # a layer: a module without modules
                for hook in (
                    module.register_forward_pre_hook(look(f"in the input of {name}")),
                    module.register_forward_hook(look(f"in the output of {name}")),
                ):
                    hooks.callback(hook.remove)
        call.evaluate(network)
    return found[0] if found else "in the output of the network"
