"""Models in diffusers folders: unconditional U-Nets, latent diffusion, class-conditional DiT."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel, VQModel
from torch import nn

from ptq_exp.diffusion.denoisers import DiTDenoiser, FirstStage, UNetDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.zoo.build import frozen, torch_dtype
from ptq_exp.diffusion.zoo.components import (
    component_digest,
    component_folder,
    load_component,
    local_folder,
    read_json,
    settings_files,
)
from ptq_exp.diffusion.zoo.scheduler import Scheduler, read_scheduler
from ptq_exp.errors import CheckpointError, ConfigError

_UNET_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_PIPELINES = (*_UNET_PIPELINES, "LDMPipeline", "DiTPipeline")
_AUTOENCODERS = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
_STEPS, _DIT_GUIDANCE = 50, 4.0


def diffusers_folder(
    checkpoint: str | None = None, *, name: str = "diffusers", dtype: str = "float32"
) -> DiffusionModel:
    """A model from a local diffusers folder or a repository id.

    Known are a folder of `UNet2DModel`, and pipelines DDPM, DDIM, PNDM (their U-Net), LDM (VQ or KL first stage) and
    DiT (class-conditional, KL first stage). Schedule, clipping and spacing are those of the folder's scheduler; the
    sampler is DDIM in any case. Nothing but settings and tensors is read.

    Args:
        checkpoint: folder, or owner/name on the hub (the local cache is enough when offline).
        name: what tables call it.
        dtype: of the denoiser: float32, bfloat16, float16 or float64.

    Raises:
        CheckpointError: the folder is missing, incomplete or of an unknown kind.
        ConfigError: no folder is given, an unknown dtype, or a scheduler that is not implemented.
    """
    number_type = torch_dtype(dtype)
    if checkpoint is None:
        raise ConfigError("model.checkpoint=null: the model diffusers needs a folder or a repository id (owner/name)")
    root = local_folder(checkpoint)
    index = read_json(root / "model_index.json") if (root / "model_index.json").exists() else {}
    kind = index.get("_class_name") or read_json(root / "config.json").get("_class_name")
    if kind not in (*_PIPELINES, "UNet2DModel"):
        raise CheckpointError(f"model.checkpoint={checkpoint}: holds a {kind}; known are UNet2DModel, "
                              f"{', '.join(_PIPELINES)}")  # fmt: skip
    settings = settings_files(root)  # before the weights, which take longer
    scheduler = read_scheduler(_scheduler_config(root), checkpoint)
    build = {"LDMPipeline": _latent, "DiTPipeline": _dit}.get(kind, _pixel)
    model = build(root, index, name, scheduler)
    frozen(model.denoiser, number_type, checkpoint)
    model.structure = settings
    return model


def _scheduler_config(root: Path) -> dict | None:
    path = component_folder(root, "scheduler") / "scheduler_config.json"
    return read_json(path) if path.exists() else None


def _pixel(root: Path, index: dict, name: str, scheduler: Scheduler) -> DiffusionModel:
    unet = _unet(root)
    return DiffusionModel(
        name, UNetDenoiser(unet), scheduler.schedule, _state_shape(unet), scheduler.clip_sample,
        component_digest(root, ["unet", "scheduler"]), sampler=SamplerDefaults(_STEPS, scheduler.spacing),
    )  # fmt: skip


def _latent(root: Path, index: dict, name: str, scheduler: Scheduler) -> DiffusionModel:
    unet = _unet(root)
    first_stage = _first_stage(root, "vqvae", index)
    shape = _state_shape(unet)
    return DiffusionModel(
        name, UNetDenoiser(unet), scheduler.schedule, shape, scheduler.clip_sample,
        component_digest(root, ["unet", "vqvae", "scheduler"]), first_stage=first_stage,
        sampler=SamplerDefaults(_STEPS, scheduler.spacing), image_shape=_image_shape(first_stage, shape),
    )  # fmt: skip


def _dit(root: Path, index: dict, name: str, scheduler: Scheduler) -> DiffusionModel:
    """Every block of a DiT has its own embedding of time and label, which is left in place as a part of the block."""
    transformer = load_component(DiTTransformer2DModel, root, "transformer")
    first_stage = _first_stage(root, "vae", index)
    classes, shape = transformer.config.num_embeds_ada_norm, _state_shape(transformer)
    return DiffusionModel(
        name, DiTDenoiser(transformer, null_label=classes), scheduler.schedule, shape, scheduler.clip_sample,
        component_digest(root, ["transformer", "vae", "scheduler"]), first_stage=first_stage, n_classes=classes,
        null_label=classes, first_layers=("*pos_embed.proj",), last_layers=("*proj_out_2",),
        blocks=("*transformer_blocks.*",),
        sampler=SamplerDefaults(_STEPS, scheduler.spacing, 0.0, _DIT_GUIDANCE),
        image_shape=_image_shape(first_stage, shape),
    )  # fmt: skip


def _unet(root: Path) -> UNet2DModel:
    unet = load_component(UNet2DModel, root, "unet")
    config = unet.config
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise CheckpointError(f"model.checkpoint={root}: its U-Net is class-conditional; only unconditional ones and "
                              "DiT are known")  # fmt: skip
    if config.time_embedding_type != "positional":
        raise CheckpointError(f"model.checkpoint={root}: its U-Net has {config.time_embedding_type} time embeddings; "
                              "only models of discrete time steps are known")  # fmt: skip
    return unet


def _first_stage(root: Path, component: str, index: dict) -> nn.Module:
    kind = (index.get(component) or [None, None])[-1]
    if kind not in _AUTOENCODERS:
        raise CheckpointError(f"model.checkpoint={root}: its first stage is a {kind}; known are VQModel, AutoencoderKL")
    autoencoder = load_component(_AUTOENCODERS[kind], root, component)
    return frozen(FirstStage(autoencoder, autoencoder.config.scaling_factor))


def _state_shape(network: nn.Module) -> tuple[int, int, int]:
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def _image_shape(first_stage: FirstStage, latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """Every level of an autoencoder but the last halves the image."""
    config = first_stage.autoencoder.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    return config.out_channels, latent[1] * factor, latent[2] * factor
