"""Published diffusion models, built with `diffusers` modules and filled from their original checkpoints.

Names are imported at their first use: each architecture of `diffusers` takes seconds, and a run has one model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_MODULE_OF` names, for checkers of types and editors
    from ptq_exp.diffusion.zoo.ddpm import ddpm_cifar10
    from ptq_exp.diffusion.zoo.folder import diffusers_folder
    from ptq_exp.diffusion.zoo.improved import ddim_cifar10, ddim_imagenet64
    from ptq_exp.diffusion.zoo.latent import ldm4_imagenet256, ldm4_lsun_bedrooms256
    from ptq_exp.diffusion.zoo.place import is_local
    from ptq_exp.diffusion.zoo.structure import folder_of_structure

_MODULE_OF = {
    "ddim_cifar10": "improved",
    "ddim_imagenet64": "improved",
    "ddpm_cifar10": "ddpm",
    "diffusers_folder": "folder",
    "folder_of_structure": "structure",
    "is_local": "place",
    "ldm4_imagenet256": "latent",
    "ldm4_lsun_bedrooms256": "latent",
}
__all__ = [
    "ddim_cifar10",
    "ddim_imagenet64",
    "ddpm_cifar10",
    "diffusers_folder",
    "folder_of_structure",
    "is_local",
    "ldm4_imagenet256",
    "ldm4_lsun_bedrooms256",
]


def __getattr__(name: str) -> Any:
    """Import `name` from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
