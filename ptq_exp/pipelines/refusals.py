"""Folders and files that are refused: code of their own, pickled weights, weights that are quantized already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import diffusers
from safetensors import SafetensorError, safe_open

from ptq_exp.diffusion.zoo.settings import Settings, read_json
from ptq_exp.errors import CheckpointError, one_line

LIBRARIES = ("diffusers", "transformers")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.txt")
"""Files without one of which transformers would make an empty tokenizer."""
_REAL = ("F64", "F32", "F16", "BF16")


def check_folder(index: Settings) -> None:
    """Raise CheckpointError unless the folder of a pipeline holds settings and safetensors of full precision alone.

    Args:
        index: its `model_index.json`.
    """
    kind = index.values.get("_class_name")
    known = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(known, type) and issubclass(known, diffusers.DiffusionPipeline)):
        raise index.error(f"holds a {kind}, which is no pipeline of diffusers; code from a folder is never run")
    for name, (library, cls) in components_of(index):
        if library not in LIBRARIES and not hasattr(diffusers.pipelines, library):
            raise index.error(f"{name} is a {cls} of {library}: code from elsewhere is never run; give a folder whose "
                              "components are of diffusers and transformers")
        if not (index.root / name).is_dir():
            raise index.error(f"names a {name}, but there is no folder of that name")
        if "Tokenizer" in cls and not any(list((index.root / name).glob(pattern)) for pattern in _VOCABULARIES):
            raise index.error(f"names a {name}, but there is no vocabulary in the folder of that name")
        _check_component(index.root, name)


def components_of(index: Settings) -> Iterator[tuple[str, tuple[str, str]]]:
    """Iterate over (name, (library, class)) of the components that the pipeline has."""
    for name, value in index.values.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            yield name, (value[0], value[1])


def check_file(path: Path) -> None:
    """Raise CheckpointError unless `path` is a safetensors file of real numbers."""
    if path.suffix.lower() == ".gguf" or _begins(path, b"GGUF"):
        raise CheckpointError(
            f"model.checkpoint={path}: the weights of a GGUF file are quantized already; give those in full precision"
        )
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"model.checkpoint={path}: no safetensors file, and others can hold code; give the folder of a pipeline, "
            "or its weights as .safetensors"
        )
    try:
        with safe_open(path, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.checkpoint={path}: no safetensors file: {one_line(error)}") from error
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in _REAL:
            raise CheckpointError(
                f"model.checkpoint={path}: {name} is {kind}: weights that are quantized already; give those in "
                "float32, float16 or bfloat16"
            )


def _check_component(root: Path, name: str) -> None:
    folder = root / name
    if (folder / "config.json").exists():
        quantized = read_json(folder / "config.json").get("quantization_config")
        if quantized is not None:
            by = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            how = "load it by ptq_exp.load_quantized" if by == "ptq_exp" else "give the folder in full precision"
            raise CheckpointError(f"model.checkpoint={root}: {name}/config.json: quantized already, by {by}; {how}")
    safe = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled and not safe:
        raise CheckpointError(
            f"model.checkpoint={root}: {name}/{pickled[0]} is no safetensors file, and others can hold code; save the "
            "pipeline anew: save_pretrained(folder, safe_serialization=True)"
        )
    for path in safe:
        check_file(path)


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic
