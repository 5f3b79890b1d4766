"""Lightning modules that train the embedded latent model: its VQ autoencoder, then its denoiser."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_exp.embedded.digits import N_CLASSES
from ptq_exp.embedded.training.modules import DenoiserTraining, EMATraining


class AutoencoderTraining(EMATraining):
    """VQ autoencoder (van den Oord et al. 2017; latent diffusion's VQ-f4 without discriminator): L1 + MSE + commitment.

    For the first `continuous_share` of the steps nothing is quantized; then the codebook starts at the k-means centres
    of the latents, so that every code is used: a codebook that starts at random collapses to a few.

    Args:
        network: a `diffusers` `VQModel`.
        images: float [N, C, H, W], whose latents the codebook starts from.
    """

    def __init__(self, network: nn.Module, images: Tensor, *, continuous_share: float = 0.4, **settings) -> None:
        super().__init__(network, **settings)
        self.images, self.first_quantized = images, int(continuous_share * self.total_steps)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step == self.first_quantized:
            self._start_codebook()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, _ = batch
        latents = self.network.encode(images).latents
        decoded = self.network.decode(latents, force_not_quantize=self.global_step < self.first_quantized)
        error = decoded.sample - images
        loss = error.abs().mean() + error.square().mean()
        if self.global_step >= self.first_quantized:
            loss = loss + decoded.commit_loss.mean()
        return self.report_loss(loss)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        latents = encode_all(self.network, self.images.to(self.device))
        codes = self.network.quantize.embedding.weight
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, codes.shape[1]).cpu().numpy()
        centres = KMeans(len(codes), n_init=1, random_state=self.seed).fit(vectors[:: max(1, len(vectors) // 20000)])
        for network in (self.network, self.ema.module):
            network.quantize.embedding.weight.copy_(torch.from_numpy(centres.cluster_centers_))


@torch.no_grad()
def encode_all(autoencoder: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Encode images float [N, C, H, W] to latents [N, c, h, w], not quantized, as latent diffusion trains on them."""
    return torch.cat([autoencoder.encode(batch).latents for batch in images.split(batch_size)])


class LatentDenoiserTraining(DenoiserTraining):
    """`DenoiserTraining` with labels; a share of `label_dropout` becomes "no class" (Ho and Salimans 2022, alg. 1)."""

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, *, label_dropout: float = 0.1, **settings) -> None:
        super().__init__(network, alphas_cumprod, **settings)
        self.label_dropout = label_dropout

    def estimate(self, x_t: Tensor, t: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        dropped = (torch.rand(len(labels), generator=generator) < self.label_dropout).to(labels.device)
        return self.network(x_t, t, labels.masked_fill(dropped, N_CLASSES))


def reconstruction_psnr(autoencoder: nn.Module, images: Tensor) -> float:
    """Return the PSNR in dB of the reconstructions of images in [-1, 1], over all pixels, with quantized latents."""
    with torch.no_grad():
        decoded = torch.cat([autoencoder(batch).sample for batch in images.split(256)]).clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(decoded, images)))


def codes_used(autoencoder: nn.Module, images: Tensor) -> int:
    """Count the codes of the codebook that occur in the latents of `images`."""
    latents = encode_all(autoencoder, images).permute(0, 2, 3, 1).reshape(-1, autoencoder.config.vq_embed_dim)
    return len(torch.cdist(latents, autoencoder.quantize.embedding.weight).argmin(1).unique())
