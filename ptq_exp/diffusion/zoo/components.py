"""Parts of a diffusers folder: loaded without leftovers, never run as code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn

from ptq_exp.diffusion.checkpoints import read_checkpoint
from ptq_exp.diffusion.zoo.build import MAPPED, RANDOM, of_random_weights
from ptq_exp.diffusion.zoo.room import mapped_type, short
from ptq_exp.diffusion.zoo.settings import read_json
from ptq_exp.diffusion.zoo.weights import STEM, damage, find_weights
from ptq_exp.errors import CheckpointError, one_line
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.finite import is_finite, require_finite

log = logging.getLogger(__name__)


def load_component(
    cls: type[nn.Module], root: Path, component: str, dtype: torch.dtype = torch.float32,
    wanted: torch.dtype | None = None,
) -> nn.Module:
    """Read a module of class `cls` in `dtype` from `root/component` (or `root` itself, for early repositories).

    Args:
        wanted: the type that it is converted to later, `model.dtype`; None = it stays as it is. Inside `mapped_weights`
            what is of this type in files is left there.

    Raises:
        CheckpointError: weights are missing, left over, of another shape, or in a file that cannot be read safely.
        ConfigError: inside `mapped_weights`, they would have to be converted and there is no room for that.
    """
    folder = component_folder(root, component)
    dtype = torch.promote_types(dtype, wanted or dtype)  # on its way to float64 nothing is rounded
    if RANDOM.get():
        return of_random_weights(cls, read_json(folder / "config.json"), f"model.checkpoint={folder}")
    try:
        weights = find_weights(folder)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"model.checkpoint={folder}: ")
        raise CheckpointError(f"model.checkpoint={folder}: not a complete {cls.__name__}: {reason}") from error
    if mapped := MAPPED.get() is not None:
        dtype = mapped_type(folder, weights.files, dtype, wanted)
    try:
        with _quiet():  # what does not fit is reported below, in one line
            module, info = cls.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, torch_dtype=dtype,
                low_cpu_mem_usage=mapped, variant=weights.variant, use_safetensors=weights.safe,
            )
    except Exception as error:  # whatever a damaged folder makes the library stumble over
        reason = damage(weights.files) or one_line(error, 300)
        raise CheckpointError(
            f"model.checkpoint={folder}: not a complete {cls.__name__} of its config.json ({reason})"
        ) from error
    found = {what.removesuffix("_keys"): keys for what, keys in info.items() if keys}
    if found and not _filled(module, weights.files):
        shown = "; ".join(f"{len(keys)} {what} ({', '.join(map(str, list(keys)[:3]))})" for what, keys in found.items())
        raise CheckpointError(f"model.checkpoint={folder}: not the weights of its own config.json: {shown}")
    _require_real(module, weights.files)
    _require_finite(module, folder, weights.files)
    if weights.variant is not None:
        _say_variant(folder, weights.variant, module, wanted)
    return module


def _say_variant(folder: Path, variant: str, module: nn.Module, wanted: torch.dtype | None) -> None:
    """Log that `module` was read from a variant, in which types, and in which it is kept if that is another one."""
    read = sorted({short(value.dtype) for value in module.state_dict().values() if value.is_floating_point()})
    kept = "" if wanted is None or short(wanted) in read else f", kept in {short(wanted)}"
    log.warning(
        "%s: only the %s variant of the weights is there: read in %s%s", folder, variant, " and ".join(read), kept
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _filled(module: nn.Module, files: Sequence[Path]) -> bool:
    """Whether the files hold the weights of `module` inside something that can be taken off: then it has them now.

    Raises:
        CheckpointError: a file holds several state dicts.
    """
    state = {name: tensor for path in files for name, tensor in read_checkpoint(path).items()}
    own = module.state_dict()
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        return False
    if any(value.is_meta for value in own.values()):  # inside `mapped_weights`
        module.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, assign=True)
    else:
        module.load_state_dict(state)
    return True


def _require_real(module: nn.Module, files: Sequence[Path]) -> None:
    """Raise CheckpointError if whole numbers stand where `module` has real ones: codes of a quantized network."""
    real = {name for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    for path in files:
        for name, tensor in read_checkpoint(path).items():
            if name in real and not tensor.is_floating_point():
                raise CheckpointError(f"model.checkpoint={path}: {name} is {short(tensor.dtype)}, not real numbers; "
                                      "give the weights in float32, float16 or bfloat16")


def _require_finite(module: nn.Module, folder: Path, files: Sequence[Path]) -> None:
    """Raise CheckpointError if a weight is NaN or infinite; the message names its file."""
    state = module.state_dict()
    if (broken := next((name for name, tensor in state.items() if not is_finite(tensor)), None)) is None:
        return
    where = f"model.checkpoint={_file_of(folder, files, broken)}"
    require_finite({broken: state[broken]}, where, "download or save the file again", CheckpointError)


def _file_of(folder: Path, files: Sequence[Path], name: str) -> Path:
    """Return the one of `files` that holds the bad tensor `name`; `folder` where it is not known."""
    if len(files) > 1:
        files = [path for path in files if path.suffix == ".safetensors" and _holds_bad(path, name)]
    return files[0] if len(files) == 1 else folder


def _holds_bad(path: Path, name: str) -> bool:
    with safe_open(path, "pt") as tensors:
        return name in tensors.keys() and not is_finite(tensors.get_tensor(name))


def settings_files(root: Path) -> dict[str, dict]:
    """Return the content of the settings files of a folder, by relative path: all but the weights, as JSON can hold it.

    Infinite values are left out. The reader has refused those that it follows; what remains belongs to a solver
    (`lambda_min_clipped` of DPM-Solver is minus infinity where it is not set), and an absent setting is its default.

    Raises:
        CheckpointError: a file cannot be read, or holds NaN or infinity inside a list.
    """
    index = read_json(root / "model_index.json") if (root / "model_index.json").exists() else {}
    components = ["", "scheduler", "unet", *filter(str.isidentifier, index)]
    names = ("model_index.json", "config.json", "scheduler_config.json")
    paths = dict.fromkeys(root / component / name for component in components for name in names)
    found = {}
    for path in paths:
        if not path.exists():
            continue
        name = path.relative_to(root).as_posix()
        values = read_json(path).items()
        found[name] = {key: value for key, value in values if not isinstance(value, float) or math.isfinite(value)}
        try:
            json.dumps(found[name], allow_nan=False)
        except ValueError as error:
            line = f"model.checkpoint={root}: {name} holds NaN or infinity; mend its settings"
            raise CheckpointError(line) from error
    return found


def component_folder(root: Path, component: str) -> Path:
    """Where a component of a pipeline lies."""
    return root / component if component and (root / component).is_dir() else root


def component_digest(root: Path, components: Sequence[str]) -> str:
    """SHA-256 over settings and weights of the named components."""
    digest = hashlib.sha256()
    for component in components:
        folder = component_folder(root, component)
        for path in sorted([*folder.glob(f"{STEM}*"), *folder.glob("*config.json")]):
            digest.update(f"{component}/{path.name}".encode())
            digest.update(file_digest(path).encode())
    return digest.hexdigest()
