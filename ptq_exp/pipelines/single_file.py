"""Checkpoints of one file, such as fine-tunes of Stable Diffusion and FLUX, by diffusers' own readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_accelerate_available
from safetensors import safe_open
from torch import nn

from ptq_exp.diffusion.zoo.place import INDEX
from ptq_exp.diffusion.zoo.settings import Settings
from ptq_exp.errors import CheckpointError, ConfigError, PTQError, one_line
from ptq_exp.pipelines.refusals import check_folder, components_of

_FURTHER = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoder")
"""Names that begin the weights of other components than the network, in files that hold a whole pipeline."""
_NETWORKS = ("unet", "transformer")


def open_file(path: Path, dtype: torch.dtype, config: str | None, open_folder: Callable[..., Any]) -> Any:
    """Return the pipeline of a `.safetensors` file.

    A file of the network alone, as those of FLUX are, is completed by the other components in the folder of settings.

    Args:
        config: folder of a pipeline of that kind, its settings and tokenizers; None = as in the hub's cache.
        open_folder: opens a folder with some components given, see `folder.open_folder`.

    Raises:
        ConfigError: no folder of settings, or accelerate is not installed.
        CheckpointError: the file does not hold what its settings say.
    """
    if not is_accelerate_available():
        raise ConfigError(
            f"model.checkpoint={path}: without the package accelerate nothing says what a single file lacks: install it"
        )
    root = settings_folder(path, config)
    index = Settings.read(root, INDEX)
    check_folder(index)
    with safe_open(path, "pt") as tensors:
        whole = any(name.startswith(_FURTHER) for name in tensors.keys())
    try:
        if whole:
            cls = getattr(diffusers, index.values["_class_name"])
            pipeline = cls.from_single_file(str(path), config=str(root), local_files_only=True, torch_dtype=dtype)
            _require_filled(path, pipeline.components)
            return pipeline
        name, cls = next((name, cls) for name, (_, cls) in components_of(index) if name in _NETWORKS)
        network = getattr(diffusers, cls).from_single_file(
            str(path), config=str(root), subfolder=name, local_files_only=True, torch_dtype=dtype
        )
        _require_filled(path, {name: network})
    except PTQError:
        raise
    except Exception as error:  # the readers stumble over files of other kinds in many ways
        raise CheckpointError(
            f"model.checkpoint={path}: not a {index.values['_class_name']} as the settings in {root} say: "
            f"{one_line(error, 300)}"
        ) from error
    return open_folder(root, dtype, **{name: network})


def _require_filled(path: Path, components: Mapping[str, Any]) -> None:
    """Raise CheckpointError for weights that the file did not hold: they have no values (meta device)."""
    for name, part in components.items():
        state = part.state_dict() if isinstance(part, nn.Module) else {}
        if empty := [key for key, value in state.items() if value.is_meta]:
            raise CheckpointError(
                f"model.checkpoint={path}: {len(empty)} weights of the {name} are missing ({', '.join(empty[:3])})"
            )


def settings_folder(path: Path, config: str | None) -> Path:
    """Return the folder that says what the networks in the file `path` look like.

    Raises:
        ConfigError: it is not given, and not in the hub's cache; or what is given is no such folder.
    """
    if config is not None:
        if not (Path(config) / INDEX).exists():
            raise ConfigError(f"model.config={config}: no folder of a pipeline's settings: there is no {INDEX} in it")
        return Path(config)
    repository = _published(path)
    if repository is not None:
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(repository, local_files_only=True))
        except Exception:  # the client has many kinds of errors for what is not there
            root = None
        if root is not None and (root / INDEX).exists():
            return root
    raise ConfigError(
        f"model.checkpoint={path}: a single file does not say what its networks look like: set model.config to a "
        f"folder with the settings of {repository or 'its pipeline'}: {INDEX} and the folders that it names, without "
        "weights"
    )


def _published(path: Path) -> str | None:
    """Return the repository whose settings diffusers takes for files of this kind; None = an unknown kind."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        state = load_single_file_checkpoint(str(path), local_files_only=True)
        return fetch_diffusers_config(state)["pretrained_model_name_or_path"]
    except (KeyError, ValueError, OSError):
        return None
