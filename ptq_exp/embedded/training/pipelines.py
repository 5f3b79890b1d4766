"""How the embedded pipelines are trained and exported: data, settings, folders, cards."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ptq_exp.embedded.attributes import levels
from ptq_exp.embedded.digits import LATENT_IMAGE_SIZE, Digits, digits
from ptq_exp.embedded.networks import build_autoencoder
from ptq_exp.embedded.pipeline_networks import build_kl_autoencoder
from ptq_exp.embedded.pipelines import NETWORKS, make_readable, save_pipeline, velocity_scheduler
from ptq_exp.embedded.prompts import HELD_OUT, Asked, prompt
from ptq_exp.embedded.training.modules import EMATraining
from ptq_exp.embedded.training.pipeline_modules import FlowTraining, KLAutoencoderTraining, VelocityTraining
from ptq_exp.embedded.training.prompt_quality import prompt_quality
from ptq_exp.embedded.weights_file import load_weights
from ptq_exp.evaluation.images import mean_psnr, to_uint8
from ptq_exp.storage.atomic import file_digest

STEPS = {"kl_autoencoder": 600, "digits_text": 2250, "digits_flow": 1750}
"""Default number of optimizer steps of each."""
SHEARS = (-0.15, -0.075, 0.0, 0.075, 0.15)
BATCH_SIZES = {"kl_autoencoder": 64, "digits_text": 32, "digits_flow": 32}
DATA = {
    "kl_autoencoder": "32x32, four fifths",
    **dict.fromkeys(NETWORKS, "latents of the autoencoder at 32x32, all but the ten held-out combinations"),
}


def training_module(network: str, weights: Path, **settings) -> tuple[EMATraining, TensorDataset]:
    """Build the Lightning module of `network` and its data.

    Args:
        network: kl_autoencoder, digits_text or digits_flow.
        weights: folder of what was trained before: the VQ autoencoder that the KL autoencoder starts from, and the
            KL autoencoder of the pipelines.
        settings: seed and total_steps.
    """
    if network == "kl_autoencoder":
        data = TensorDataset(*digits("train", LATENT_IMAGE_SIZE))
        return KLAutoencoderTraining(_started_autoencoder(weights), lr=1e-3, ema_decay=0.99, **settings), data
    prompted = NETWORKS[network]()
    latents, texts = prompted_latents(trained_autoencoder(weights), digits("all", LATENT_IMAGE_SIZE))
    data = TensorDataset(latents, prompted.tokenize(texts).view(len(latents), 3, -1))
    shared = {"lr": 1e-3, "ema_decay": 0.998, **settings}
    if network == "digits_text":
        return VelocityTraining(prompted, velocity_scheduler(), **shared), data
    return FlowTraining(prompted, **shared), data


def _started_autoencoder(weights: Path) -> AutoencoderKL:
    """Build the KL autoencoder with every weight of the trained VQ autoencoder that has its place and shape there."""
    trained, started = build_autoencoder(), build_kl_autoencoder()
    load_weights(trained, weights / "digits_vq.safetensors")
    state = started.state_dict()
    taken = {name: value for name, value in trained.state_dict().items()
             if name.startswith(("encoder.", "decoder.")) and value.shape == state[name].shape}
    started.load_state_dict(state | taken)
    return started


def trained_autoencoder(weights: Path) -> AutoencoderKL:
    """Load the KL autoencoder that `train_embedded kl_autoencoder` left in the folder of `digits_text`."""
    folder = weights / "digits_text" / "vae"
    # from_pretrained would keep the path of the folder in the configuration, and with it in what is exported
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images float [N, 1, 32, 32] to the means of their latents, scaled to unit variance, [N, 4, 8, 8]."""
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(256)])
    return means * vae.config.scaling_factor


def prompted_latents(vae: AutoencoderKL, data: Digits) -> tuple[Tensor, list[str]]:
    """Encode all digits but those of the held-out combinations, float [N, 4, 8, 8], and write three texts for each.

    Every scan comes as it is and sheared by the other `SHEARS`, and gets the words for what is measured afterwards: the
    same hand in several slants tells the network what the words mean. The texts [3 N]: the whole prompt, the prompt
    without its word for the slant, the empty prompt.
    """
    data = Digits(torch.cat([sheared(data.images, by) for by in SHEARS]), data.labels.repeat(len(SHEARS)))
    images, labels = to_uint8(data.images), data.labels.numpy()
    measured = labels, levels("width", images, labels), levels("slant", images, labels)
    wanted = [Asked(*map(int, row)) for row in zip(*measured, strict=True)]
    kept = [i for i, combination in enumerate(wanted) if combination not in HELD_OUT]
    texts = [text for i in kept for text in (prompt(*wanted[i]), prompt(wanted[i].digit, wanted[i].width), "")]
    return encode_all(vae, data.images[kept]), texts


def sheared(images: Tensor, by: float) -> Tensor:
    """Add `by` to the slant of images float [N, C, H, W] in [-1, 1]; paper (-1) comes in at the edges."""
    theta = torch.tensor([[1.0, by, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images + 1, F.affine_grid(theta, list(images.shape), align_corners=False),
                         align_corners=False) - 1


def export(network: str, module: EMATraining, weights: Path, samples: int) -> dict:
    """Write the EMA weights into the folder of `network`, and return what its card says of their quality."""
    trained = module.ema.module.eval()
    if network == "kl_autoencoder":
        folder = weights / "digits_text" / "vae"
        return _export_autoencoder(trained, folder) | {"files": file_digests(folder, weights)}
    save_pipeline(trained.pipeline(trained_autoencoder(weights)), weights / network)
    return prompt_quality(network, weights / network, samples) | {"files": file_digests(weights / network, weights)}


def file_digests(folder: Path, weights: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights in a folder, by its path below `weights`; for a card."""
    found = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(weights).as_posix(): file_digest(path) for path in found}


def _export_autoencoder(vae: AutoencoderKL, folder: Path) -> dict:
    latents = encode_all(vae, digits("train", LATENT_IMAGE_SIZE).images)
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 6))
    vae.half().save_pretrained(folder)
    make_readable(folder)
    images = digits("held_out", LATENT_IMAGE_SIZE).images
    vae = AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        decoded = torch.cat([vae(batch).sample for batch in images.split(256)])
    return {
        "scaling_factor": vae.config.scaling_factor,
        "mean_of_scaled_latents": round(float(latents.mean() / latents.std()), 4),
        "held_out_psnr_db": round(mean_psnr(to_uint8(decoded), to_uint8(images)), 2),
    }
