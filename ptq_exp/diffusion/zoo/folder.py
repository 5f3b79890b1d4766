"""Models in diffusers folders: U-Nets on pixels or latents, with or without conditions, class-conditional DiT."""

from __future__ import annotations

import hashlib
import logging

import torch
from diffusers import DiTTransformer2DModel

from ptq_exp.diffusion.conditions import ConditionTable
from ptq_exp.diffusion.denoisers import DiTDenoiser
from ptq_exp.diffusion.model import DiffusionModel, SamplerDefaults
from ptq_exp.diffusion.prediction import as_eps
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
from ptq_exp.diffusion.zoo.scheduler import Scheduler, read_scheduler
from ptq_exp.diffusion.zoo.settings import Settings, whole
from ptq_exp.diffusion.zoo.unet import CLASSES, read_unet
from ptq_exp.errors import ConfigError
from ptq_exp.storage.atomic import file_digest

log = logging.getLogger(__name__)
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "DiTPipeline")
_STEPS, _DIT_GUIDANCE = 50, 4.0


def diffusers_folder(
    checkpoint: str | None = None, *, name: str = "diffusers", dtype: str = "float32", conditions: str | None = None
) -> DiffusionModel:
    """Return a model from a local diffusers folder or a repository id.

    Known are a folder of `UNet2DModel` or `UNet2DConditionModel`, and pipelines DDPM, DDIM, PNDM (their U-Net), LDM and
    DiT (class-conditional) with an autoencoder as first stage. Schedule, clipping, spacing and what is predicted (the
    noise, v or x0) are those of the folder's scheduler; the sampler is DDIM in any case. What the folder says and
    cannot be followed is refused by name, before weights are read. Nothing but settings and tensors is read.

    Args:
        checkpoint: folder, or owner/name on the hub (the local cache is enough when offline).
        name: what tables call it.
        dtype: of the denoiser: float32, bfloat16, float16 or float64.
        conditions: an `.npz` file of what a U-Net takes beside class labels, such as embedded prompts, see
            `ConditionTable.read`; None = nothing.

    Raises:
        CheckpointError: the folder is missing, incomplete or of an unknown kind.
        ConfigError: no folder is given, an unknown dtype, a scheduler that is not implemented, or conditions that the
            network needs or does not take.
        DataError: `conditions` is no such file.
    """
    number_type = torch_dtype(dtype)
    if checkpoint is None:
        raise ConfigError("model.checkpoint=null: the model diffusers needs a folder or a repository id (owner/name)")
    root = local_folder(checkpoint)
    index = Settings.read(root, INDEX) if (root / INDEX).exists() else Settings(root, INDEX, {})
    of = index if index.values else Settings.read(root, "config.json")
    kind = of.values.get("_class_name")
    if kind not in (*_PIPELINES, *CLASSES):
        raise of.error(f"holds a {kind}; known are {', '.join((*CLASSES, *_PIPELINES))}")
    scheduler = _scheduler(index)
    table = None if conditions is None else ConditionTable.read(conditions)
    if kind == "DiTPipeline":
        if table is not None:
            raise ConfigError(f"model.conditions={conditions}: a DiT takes class labels alone; set it to null")
        model = _dit(index, name, scheduler, number_type)
    else:
        model = _unet(index, name, scheduler, table, number_type, latent=kind == "LDMPipeline")
    # the coefficients of another prediction stay in float64, whatever the type of the network
    model.denoiser = as_eps(frozen(model.denoiser, number_type, checkpoint), scheduler.prediction, scheduler.schedule)
    model.structure = settings_files(root)
    if conditions is not None:
        model.digest = hashlib.sha256(f"{model.digest} {file_digest(conditions)}".encode()).hexdigest()
    return model


def _scheduler(index: Settings) -> Scheduler:
    """Of the folder; DDPM's for a network alone."""
    folder = component_folder(index.root, "scheduler")
    path = (folder / "scheduler_config.json").relative_to(index.root)
    if not (index.root / path).exists():
        if not index.values:
            taken = "no scheduler settings; assuming linear betas 1e-4..0.02 over 1000 steps, x0 clipped"
            log.warning("%s: %s", index.root, taken)
            return read_scheduler(Settings(index.root, str(path), {"_class_name": "DDPMScheduler"}, ConfigError))
        raise index.error("a pipeline has a scheduler, but there is no scheduler/scheduler_config.json")
    settings = Settings.read(index.root, str(path), ConfigError)
    return read_scheduler(settings, named_class(index, "scheduler"), index.values.get("_class_name"))


def _unet(
    index: Settings, name: str, scheduler: Scheduler, table: ConditionTable | None, dtype: torch.dtype, *, latent: bool
) -> DiffusionModel:
    """Return a U-Net on pixels, or on the latents of a first stage."""
    unet = read_unet(index, table)
    first_stage, component, image_shape = None, None, None
    if latent:
        first_stage, component, image_shape = read_first_stage(index, unet.settings, unet.shape)
    return DiffusionModel(
        name, unet.load(index, dtype), scheduler.schedule, unet.shape, scheduler.clip_sample,
        _digest(index, scheduler, *filter(None, ("unet", component))), first_stage=first_stage,
        n_classes=unet.classes if unet.classes > 1 else None, sampler=_sampler(scheduler), image_shape=image_shape,
        conditions=table, blocks=unet.blocks,
    )


def _dit(index: Settings, name: str, scheduler: Scheduler, dtype: torch.dtype) -> DiffusionModel:
    """Every block of a DiT has its own embedding of time and label, which is left in place as a part of the block."""
    settings, shape, classes = _dit_settings(index)
    first_stage, component, image_shape = read_first_stage(index, settings, shape)
    transformer = load_component(DiTTransformer2DModel, index.root, "transformer", wanted=dtype)
    return DiffusionModel(
        name, DiTDenoiser(transformer, null_label=classes), scheduler.schedule, shape, scheduler.clip_sample,
        _digest(index, scheduler, "transformer", component), first_stage=first_stage, n_classes=classes,
        null_label=classes, first_layers=("*pos_embed.proj",), last_layers=("*proj_out_2",),
        blocks=("*transformer_blocks.*",), sampler=_sampler(scheduler, _DIT_GUIDANCE), image_shape=image_shape,
    )


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
    network = DiTDenoiser(hollow(settings, DiTTransformer2DModel, config), null_label=classes)
    check_estimate(settings, network, shape, y=torch.zeros(1, dtype=torch.long, device="meta"))
    return settings, shape, classes


def _sampler(scheduler: Scheduler, guidance_scale: float = 1.0) -> SamplerDefaults:
    steps = min(_STEPS, len(scheduler.schedule))
    return SamplerDefaults(steps, scheduler.spacing, guidance_scale=guidance_scale)


def _digest(index: Settings, scheduler: Scheduler, *components: str) -> str:
    """Of settings and weights, and of the scheduler's class where it is not the one in its file."""
    digest = component_digest(index.root, [*components, "scheduler"])
    return hashlib.sha256(f"{digest} {scheduler.name}".encode()).hexdigest() if scheduler.converted else digest
