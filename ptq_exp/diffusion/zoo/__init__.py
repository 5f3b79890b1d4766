"""Published diffusion models, built with `diffusers` modules and filled from their original checkpoints."""

from ptq_exp.diffusion.zoo.ddpm import ddpm_cifar10
from ptq_exp.diffusion.zoo.folder import diffusers_folder
from ptq_exp.diffusion.zoo.improved import ddim_cifar10, ddim_imagenet64
from ptq_exp.diffusion.zoo.latent import ldm4_imagenet256, ldm4_lsun_bedrooms256
from ptq_exp.diffusion.zoo.place import is_local
from ptq_exp.diffusion.zoo.structure import folder_of_structure

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
