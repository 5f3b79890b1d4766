"""The weights inside the package, and their cards."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq_exp.errors import CheckpointError
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.finite import bad_values, is_finite

WEIGHTS = Path(__file__).parent / "weights"


def card(name: str) -> dict:
    """Read the card of a file of weights, such as digits_unet or digits_vq: training and quality."""
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


def load_weights(network: nn.Module, path: Path) -> str:
    """Fill `network` strictly from a safetensors file; returns the file's SHA-256.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or has other keys or shapes than the network.
    """
    try:
        state = load_file(path)
        _check_numbers(path, state, network.state_dict())
        network.load_state_dict(state)
    except FileNotFoundError as error:
        raise CheckpointError(f"model.checkpoint={path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"model.checkpoint={path}: not a readable file ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"model.checkpoint={path}: not a complete safetensors file ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise CheckpointError(f"model.checkpoint={path}: weights of another network ({reason})") from error
    network.eval().requires_grad_(False)
    return file_digest(path)


def _check_numbers(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise CheckpointError for weights that are NaN or infinite."""
    for name, tensor in state.items():
        if name not in expected or not expected[name].is_floating_point():
            continue
        what = None if tensor.is_floating_point() else f"is {tensor.dtype}, not real numbers"
        if what is None and not is_finite(tensor):
            what = f"holds {bad_values(tensor)}"
        if what:
            raise CheckpointError(f"model.checkpoint={path}: {name} {what}: train it again, or give another file")
