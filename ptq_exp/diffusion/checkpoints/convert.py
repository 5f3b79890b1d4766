"""Filling `diffusers` modules from a state dict, totally: no tensor is left over and no parameter stays empty."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.checkpoints.families import looks_like
from ptq_exp.diffusion.time_grid import NoiseSchedule
from ptq_exp.errors import CheckpointError
from ptq_exp.storage.finite import require_finite

Rename = Callable[[str, Tensor], Mapping[str, Tensor]]
_SHOWN = 3


def identity(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the `Rename` of a file that is in the layout of `diffusers` already."""
    return {key: tensor}


@dataclass(frozen=True)
class Part:
    """A module and where its tensors are: those under `prefix`, each turned by `rename` into tensors of the module."""

    module: nn.Module
    rename: Rename
    prefix: str = ""


@dataclass
class _Findings:
    """What keeps a state dict from filling its modules; missing parameters bear the names of `diffusers`."""

    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        parts = []
        for what, keys in vars(self).items():
            keys = list(dict.fromkeys(keys))  # the three parts of a fused weight share one name
            if keys:
                more = ", ..." if len(keys) > _SHOWN else ""
                parts.append(f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{more})")
        return "; ".join(parts)


def fill(
    parts: Sequence[Part], state: Mapping[str, Tensor], path: str | os.PathLike, *, wanted: str,
    unused: Sequence[str] = (),
) -> None:
    """Give every part its float32 tensors, copied out of the (memory-mapped) file; modules may be on the meta device.

    Args:
        wanted: what file is expected, for the message.
        unused: patterns of names that are deliberately not used.

    Raises:
        CheckpointError: a tensor is neither used nor in `unused`, a parameter has no tensor, a shape differs, or
            values are no real numbers; the message names the first of each and says what the file looks like.
    """
    findings = _Findings()
    targets: list[dict[str, tuple[str, Tensor]]] = [{} for _ in parts]
    for key, tensor in state.items():
        if not _place(key, tensor, parts, targets) and not any(fnmatchcase(key, pattern) for pattern in unused):
            findings.unexpected.append(key)
    for part, target in zip(parts, targets, strict=True):
        _compare(part, target, state, findings)
    if sentence := findings.sentence():
        raise CheckpointError(
            f"model.checkpoint={path}: not the weights of this network: {sentence}. The file looks like "
            f"{looks_like(state)}; wanted is {wanted}"
        )
    for part, target in zip(parts, targets, strict=True):
        owned = {name: _own(tensor) for name, (_, tensor) in target.items()}
        in_file = ((target[name][0], tensor) for name, tensor in owned.items())
        remedy = "download the file again (weights are read in float32)"
        require_finite(in_file, f"model.checkpoint={path}", remedy, CheckpointError)
        part.module.load_state_dict(owned, assign=True)


def _place(key: str, tensor: Tensor, parts: Sequence[Part], targets: list[dict[str, tuple[str, Tensor]]]) -> bool:
    """Put a tensor where it belongs; False if there is no such place."""
    for part, target in zip(parts, targets, strict=True):
        if key.startswith(part.prefix):
            renamed = part.rename(key.removeprefix(part.prefix), tensor)
            if renamed and not renamed.keys() & target.keys():
                target.update({name: (key, value) for name, value in renamed.items()})
                return True
    return False


def _compare(
    part: Part, target: dict[str, tuple[str, Tensor]], state: Mapping[str, Tensor], findings: _Findings
) -> None:
    wanted = part.module.state_dict()
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    of = f" of {part.prefix.rstrip('.')}" if part.prefix else ""
    findings.missing += [name + of for name in expected if name not in target]
    parts = Counter(key for key, _ in target.values())  # a fused weight becomes several
    for name, (key, tensor) in target.items():
        if name not in expected:
            findings.unexpected.append(key)
        elif tuple(tensor.shape) != expected[name]:
            times = f"{parts[key]} x " if parts[key] > 1 else ""
            findings.misshaped.append(f"{key} {list(state[key].shape)} instead of {times}{list(expected[name])}")
        elif wanted[name].is_floating_point() and not tensor.is_floating_point():
            findings.mistyped.append(f"{key} of {str(tensor.dtype).removeprefix('torch.')} instead of real numbers")


def _own(tensor: Tensor) -> Tensor:
    """Return a float32 copy without the file behind it, which may be deleted or overwritten meanwhile."""
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def check_schedule(state: Mapping[str, Tensor], schedule: NoiseSchedule, path: str | os.PathLike) -> None:
    """Compare the training schedule in a file, where there is one, with ours (relative 1e-5).

    Raises:
        CheckpointError: `betas` or `alphas_cumprod` of the file are others.
    """
    for key, expected in {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod.double()}.items():
        if key not in state:
            continue
        found = state[key].double()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=0):
            raise CheckpointError(
                f"model.checkpoint={path}: trained with another noise schedule: {key} runs {_ends(found)} over "
                f"{found.numel()} steps instead of {_ends(expected)} over {expected.numel()}"
            )


def _ends(values: Tensor) -> str:
    flat = values.flatten()
    return f"{float(flat[0]):.6g}..{float(flat[-1]):.6g}" if flat.numel() else "nothing"
