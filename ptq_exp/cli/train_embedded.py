"""Train an embedded network: `python -m ptq_exp train_embedded {unet,classifier,autoencoder,latent_unet,dit}`.

Or an embedded pipeline: `kl_autoencoder` (starts from `autoencoder`), then `digits_text` and `digits_flow`.

Checkpoints go to `runs/train/<network>/`; the same command resumes from the last one. At the end the EMA weights
and a JSON card (how trained, seed, losses, accuracy) are written into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from ptq_exp.deploy.draw import draw
from ptq_exp.diffusion import DiffusionModel, NoiseSchedule
from ptq_exp.embedded import DigitsExtractor
from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE, digits
from ptq_exp.embedded.latent import DIT_BLOCKS, UNET_BLOCKS, first_stage, latent_model
from ptq_exp.embedded.networks import (
    BETA_SCHEDULE,
    TRAIN_STEPS,
    DigitsClassifier,
    build_autoencoder,
    build_dit,
    build_latent_unet,
    build_unet,
)
from ptq_exp.embedded.training import pipelines
from ptq_exp.embedded.training.latent_modules import (
    AutoencoderTraining,
    LatentDenoiserTraining,
    codes_used,
    encode_all,
    reconstruction_psnr,
)
from ptq_exp.embedded.training.modules import ClassifierTraining, DenoiserTraining, EMATraining
from ptq_exp.embedded.weights_file import WEIGHTS
from ptq_exp.errors import command_line
from ptq_exp.evaluation import extract_features, inception_score
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.paths import PathArgument

NETWORKS = {"unet": 5000, "classifier": 2500, "autoencoder": 1500, "latent_unet": 5000, "dit": 6000, **pipelines.STEPS}
"""Default number of optimizer steps of each."""
LATENT_NETWORKS = {"latent_unet": (build_latent_unet, UNET_BLOCKS), "dit": (build_dit, DIT_BLOCKS)}
"""Networks on the latents of the autoencoder: how each is built, and the names of its blocks."""
FILES = {"autoencoder": "digits_vq", "kl_autoencoder": "digits_kl", **{name: name for name in pipelines.NETWORKS}}
DATA = {
    "unet": "16x16, all 1,797", "classifier": "16x16, four fifths", "autoencoder": "32x32, four fifths",
    **dict.fromkeys(LATENT_NETWORKS, "latents of the autoencoder at 32x32, all 1,797"), **pipelines.DATA,
}


def loader(data: TensorDataset, batch_size: int, seed: int) -> DataLoader:
    """Load batches, shuffled by (seed, epoch) alone so that a resumed training sees the same order."""
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=seed)
    return DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)


def training_module(
    network: str, steps: int, seed: int, weights: Path
) -> tuple[EMATraining, DataLoader, DataLoader | None]:
    """Build the Lightning module of `network` and its batches; `weights`: folder of the other networks' weights."""
    settings = {"seed": seed, "total_steps": steps}
    if network in pipelines.STEPS:
        module, data = pipelines.training_module(network, weights, **settings)
        return module, loader(data, pipelines.BATCH_SIZES[network], seed), None
    if network == "unet":
        alphas_cumprod = DDIMScheduler(TRAIN_STEPS, beta_schedule=BETA_SCHEDULE).alphas_cumprod
        module = DenoiserTraining(build_unet(), alphas_cumprod, lr=1e-3, ema_decay=0.999, **settings)
        return module, loader(TensorDataset(*digits()), 64, seed), None
    if network == "autoencoder":
        images, labels = digits("train", LATENT_IMAGE_SIZE)
        module = AutoencoderTraining(build_autoencoder(), images, lr=2e-3, ema_decay=0.995, **settings)
        return module, loader(TensorDataset(images, labels), 64, seed), None
    if network in LATENT_NETWORKS:
        images, labels = digits("all", LATENT_IMAGE_SIZE)
        latents, (build, _) = first_stage(weights).encode(images), LATENT_NETWORKS[network]
        alphas_cumprod = NoiseSchedule.latent_diffusion(total=TRAIN_STEPS).alphas_cumprod.float()
        module = LatentDenoiserTraining(build(), alphas_cumprod, lr=1e-3, ema_decay=0.999, **settings)
        return module, loader(TensorDataset(latents, labels), 64, seed), None
    module = ClassifierTraining(DigitsClassifier(), lr=2e-3, ema_decay=0.995, **settings)
    held_out = DataLoader(TensorDataset(*digits("held_out")), batch_size=512)
    return module, loader(TensorDataset(*digits("train")), 64, seed), held_out


def measured(
    network: str, module: EMATraining, trainer: pl.Trainer, held_out: DataLoader | None, weights: Path, samples: int
) -> dict:
    """Return what the card says about the quality of the trained network; `weights`: folder of the autoencoder."""
    if held_out is not None:
        return {"held_out_accuracy": float(trainer.validate(module, held_out, verbose=False)[0]["accuracy"])}
    if network in LATENT_NETWORKS:
        _, patterns = LATENT_NETWORKS[network]
        model = latent_model(module.ema.module.eval(), first_stage(weights), patterns, name=network, digest="")
        return sample_quality(model, samples)
    if network != "autoencoder":
        return {}
    autoencoder = module.ema.module.eval()
    latents = encode_all(autoencoder, digits("train", LATENT_IMAGE_SIZE).images)
    return {
        "scaling_factor": float(1 / latents.std()),
        "held_out_psnr_db": reconstruction_psnr(autoencoder, digits("held_out", LATENT_IMAGE_SIZE).images),
        "codes_used": codes_used(autoencoder, digits("train", LATENT_IMAGE_SIZE).images),
    }


def sample_quality(model: DiffusionModel, n: int) -> dict:
    """Measure the Inception score of `n` samples, and how often the embedded classifier sees the class asked for."""
    guided, how = model.guided(model.denoiser, model.sampler.guidance_scale), {"device": "cpu", "progress": False}
    images = draw(model, guided, model.time_grid(), n, 0, batch_size=min(n, 100), **how)
    probabilities = extract_features(DigitsExtractor(), images).probabilities
    agreement = (probabilities.argmax(1) == model.labels(range(n), 0).numpy()).mean()
    return {
        "samples": n,
        "sampler": f"{model.sampler.steps} DDIM steps, guidance scale {model.sampler.guidance_scale}, seed 0",
        "label_agreement": round(float(agreement), 4),
        "inception_score": round(float(inception_score(probabilities)), 3),
    }


def export(module: EMATraining, network: str, card: dict, folder: Path) -> None:
    """Write the EMA weights, `<name>.safetensors` or the folder of a pipeline, and what is known of them as JSON."""
    name = FILES.get(network, f"digits_{network}")
    folder.mkdir(parents=True, exist_ok=True)
    card["parameters"] = sum(p.numel() for p in module.network.parameters())
    if network not in pipelines.STEPS:
        weights = folder / f"{name}.safetensors"
        state = module.ema.module.state_dict()
        # half the bytes for the file of a transformer, as in the folders of the pipelines
        halved = {key: value.half() if network == "dit" else value for key, value in state.items()}
        save_file({key: value.contiguous() for key, value in halved.items()}, weights)
        card["sha256"] = file_digest(weights)
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def losses_by_tenth(history: list[float]) -> list[float]:
    """Return the mean training loss of each tenth of the training."""
    tenth = max(1, len(history) // 10)
    starts = range(0, min(tenth * 10, len(history)), tenth)
    return [round(sum(history[i : i + tenth]) / tenth, 5) for i in starts]


def main(argv: list[str] | None = None) -> None:
    """Train, resume or only export one network; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m ptq_exp train_embedded", description=__doc__)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {NETWORKS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; leave 1 if anything else runs")
    parser.add_argument("--work", action=PathArgument, default=Path("runs/train"), help="folder of the checkpoints")
    parser.add_argument("--out", action=PathArgument, default=WEIGHTS, help="folder of the exported weights and card")
    parser.add_argument("--samples", type=int, default=1000, help="images that a card is measured on")
    with command_line("the same command goes on from the last checkpoint"):
        train(parser.parse_args(argv))


def train(args: argparse.Namespace) -> None:
    """Train or export the network that the command line names."""
    steps = args.steps or NETWORKS[args.network]
    torch.set_num_threads(args.threads)
    pl.seed_everything(args.seed)

    module, train_batches, held_out = training_module(args.network, steps, args.seed, args.out)
    folder = args.work / args.network
    # the checkpoint of a training that is continued is meant to be there
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    every = 1 if len(train_batches) > 100 else 2
    checkpoint = ModelCheckpoint(
        folder, filename="latest", save_last=True, every_n_epochs=every, save_on_train_epoch_end=True
    )
    # counted in epochs (the module stops at the last step): with max_steps, Lightning repeats a batch on resuming
    max_epochs = math.ceil(steps / len(train_batches))
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_epochs=max_epochs, default_root_dir=folder, logger=False,
        callbacks=[checkpoint, TQDMProgressBar(refresh_rate=20)], gradient_clip_val=1.0,
        check_val_every_n_epoch=10, num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    started = time.time()
    trainer.fit(module, train_batches, held_out, ckpt_path=last if last.exists() else None, weights_only=False)
    card = {
        "network": args.network if args.network in pipelines.NETWORKS else f"digits {args.network}",
        "data": f"sklearn.datasets.load_digits, {DATA[args.network]}",
        "command": f"python -m ptq_exp train_embedded {args.network} --steps {steps} --seed {args.seed}",
        "seed": args.seed,
        "steps": module.global_step,
        "batch_size": train_batches.batch_size,
        "optimizer": f"AdamW lr {module.lr}, warm-up, constant, linear decay over the last 30 %; EMA weights",
        "minutes_of_last_session": round((time.time() - started) / 60, 1),
        "loss_by_tenth": losses_by_tenth(module.loss_history),
    }
    if args.network in pipelines.STEPS:
        card |= pipelines.export(args.network, module, args.out, args.samples)
    else:
        card |= measured(args.network, module, trainer, held_out, args.out, args.samples)
    export(module, args.network, card, args.out)
    print(json.dumps(card, indent=2))
