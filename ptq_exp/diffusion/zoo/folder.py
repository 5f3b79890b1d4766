"""Models in diffusers folders: unconditional U-Nets, latent diffusion, class-conditional DiT."""

from __future__ import annotations

import hashlib

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from ptq_exp.diffusion.denoisers import DiTDenoiser, UNetDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.zoo.build import frozen, torch_dtype
from ptq_exp.diffusion.zoo.components import component_digest, component_folder, load_component, settings_files
from ptq_exp.diffusion.zoo.first_stage import read_first_stage
from ptq_exp.diffusion.zoo.network import (
    Shape,
    check_estimate,
    component_settings,
    hollow,
    named_class,
    state_shape,
)
from ptq_exp.diffusion.zoo.place import INDEX, local_folder
from ptq_exp.diffusion.zoo.scheduler import Scheduler, assumed, read_scheduler
from ptq_exp.diffusion.zoo.settings import Settings, whole
from ptq_exp.errors import ConfigError

_UNET_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_PIPELINES = (*_UNET_PIPELINES, "LDMPipeline", "DiTPipeline")
_STEPS, _DIT_GUIDANCE = 50, 4.0


def diffusers_folder(
    checkpoint: str | None = None, *, name: str = "diffusers", dtype: str = "float32"
) -> DiffusionModel:
    """A model from a local diffusers folder or a repository id.

    Known are a folder of `UNet2DModel`, and pipelines DDPM, DDIM, PNDM (their U-Net), LDM and DiT (class-conditional)
    with an autoencoder as first stage. Schedule, clipping and spacing are those of the folder's scheduler; the sampler
    is DDIM in any case. What the folder says and cannot be followed is refused by name, before weights are read.
    Nothing but settings and tensors is read.

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
    index = Settings.read(root, INDEX) if (root / INDEX).exists() else Settings(root, INDEX, {})
    of = index if index.values else Settings.read(root, "config.json")
    kind = of.values.get("_class_name")
    if kind not in (*_PIPELINES, "UNet2DModel"):
        raise of.error(f"holds a {kind}; known are UNet2DModel, {', '.join(_PIPELINES)}")
    scheduler = _scheduler(index)
    build = {"LDMPipeline": _latent, "DiTPipeline": _dit}.get(kind, _pixel)
    model = build(index, name, scheduler)
    frozen(model.denoiser, number_type, checkpoint)
    model.structure = settings_files(root)
    return model


def _scheduler(index: Settings) -> Scheduler:
    """Of the folder; DDPM's for a network alone."""
    folder = component_folder(index.root, "scheduler")
    path = (folder / "scheduler_config.json").relative_to(index.root)
    if not (index.root / path).exists():
        if not index.values:
            return assumed(Settings(index.root, str(path), {"_class_name": "DDPMScheduler"}, ConfigError))
        raise index.error("a pipeline has a scheduler, but there is no scheduler/scheduler_config.json")
    settings = Settings.read(index.root, str(path), ConfigError)
    return read_scheduler(settings, named_class(index, "scheduler"), index.values.get("_class_name"))


def _pixel(index: Settings, name: str, scheduler: Scheduler) -> DiffusionModel:
    _, shape = _unet_settings(index)
    return DiffusionModel(
        name, UNetDenoiser(load_component(UNet2DModel, index.root, "unet")), scheduler.schedule, shape,
        scheduler.clip_sample, _digest(index, scheduler, "unet"), sampler=_sampler(scheduler),
    )  # fmt: skip


def _latent(index: Settings, name: str, scheduler: Scheduler) -> DiffusionModel:
    settings, shape = _unet_settings(index)
    first_stage, component, image_shape = read_first_stage(index, settings, shape)
    return DiffusionModel(
        name, UNetDenoiser(load_component(UNet2DModel, index.root, "unet")), scheduler.schedule, shape,
        scheduler.clip_sample, _digest(index, scheduler, "unet", component), first_stage=first_stage,
        sampler=_sampler(scheduler), image_shape=image_shape,
    )  # fmt: skip


def _dit(index: Settings, name: str, scheduler: Scheduler) -> DiffusionModel:
    """Every block of a DiT has its own embedding of time and label, which is left in place as a part of the block."""
    settings, shape, classes = _dit_settings(index)
    first_stage, component, image_shape = read_first_stage(index, settings, shape)
    transformer = load_component(DiTTransformer2DModel, index.root, "transformer")
    return DiffusionModel(
        name, DiTDenoiser(transformer, null_label=classes), scheduler.schedule, shape, scheduler.clip_sample,
        _digest(index, scheduler, "transformer", component), first_stage=first_stage, n_classes=classes,
        null_label=classes, first_layers=("*pos_embed.proj",), last_layers=("*proj_out_2",),
        blocks=("*transformer_blocks.*",), sampler=_sampler(scheduler, _DIT_GUIDANCE), image_shape=image_shape,
    )  # fmt: skip


def _unet_settings(index: Settings) -> tuple[Settings, Shape]:
    """`config.json` of the U-Net, and (C, H, W) of a state, checked against each other."""
    settings, _ = component_settings(index, "unet", ("UNet2DModel",))
    config = settings.of(UNet2DModel)
    if config["num_class_embeds"] is not None or config["class_embed_type"] is not None:
        raise settings.error("its U-Net is class-conditional (num_class_embeds, class_embed_type); only unconditional "
                             "ones and DiT are known")  # fmt: skip
    if config["time_embedding_type"] != "positional":
        raise settings.error(f"its U-Net has {config['time_embedding_type']} time embeddings (time_embedding_type); "
                             "only models of discrete time steps are known")  # fmt: skip
    shape = state_shape(settings, config)
    check_estimate(settings, hollow(settings, UNet2DModel, config), shape)
    return settings, shape


def _dit_settings(index: Settings) -> tuple[Settings, Shape, int]:
    """`config.json` of the transformer, (C, H, W) of a latent, and the number of classes."""
    settings, _ = component_settings(index, "transformer", ("DiTTransformer2DModel",))
    config = settings.of(DiTTransformer2DModel)
    shape = state_shape(settings, config)
    settings.require("sample_size", config["sample_size"], whole, "a DiT takes one number, the height and the width")
    classes = settings.require("num_embeds_ada_norm", config["num_embeds_ada_norm"], whole, "the number of classes")
    labels = index.values.get("id2label")
    if isinstance(labels, dict) and len(labels) > classes:
        raise index.error(f"id2label names {len(labels)} classes, {settings.file} says num_embeds_ada_norm={classes}")
    network = hollow(settings, DiTTransformer2DModel, config)
    check_estimate(settings, network, shape, class_labels=torch.zeros(1, dtype=torch.long, device="meta"))
    return settings, shape, classes


def _sampler(scheduler: Scheduler, guidance_scale: float = 1.0) -> SamplerDefaults:
    steps = min(_STEPS, len(scheduler.schedule))
    return SamplerDefaults(steps, scheduler.spacing, guidance_scale=guidance_scale)


def _digest(index: Settings, scheduler: Scheduler, *components: str) -> str:
    """Of settings and weights, and of the scheduler's class where it is not the one in its file."""
    digest = component_digest(index.root, [*components, "scheduler"])
    return hashlib.sha256(f"{digest} {scheduler.name}".encode()).hexdigest() if scheduler.converted else digest
