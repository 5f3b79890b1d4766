"""Lightning modules that train the embedded pipelines: the KL autoencoder, then text encoder and network together."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_exp.diffusion.noise import sample_generator
from ptq_exp.embedded.training.modules import EMATraining


class KLAutoencoderTraining(EMATraining):
    """KL autoencoder (Rombach et al. 2022, without discriminator): L1 + MSE + `kl_weight` x KL per latent element."""

    def __init__(self, network: AutoencoderKL, *, kl_weight: float = 3e-4, **settings) -> None:
        super().__init__(network, **settings)
        self.kl_weight = kl_weight

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, _ = batch
        posterior = self.network.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=sample_generator(self.seed, self.global_step))
        error = self.network.decode(posterior.mean + posterior.std * noise.to(images)).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return self.report_loss(error.abs().mean() + error.square().mean() + self.kl_weight * kl)


class PromptedTraining(EMATraining):
    """Shared part of both pipelines: a batch is (latents [N, C, H, W], token ids [N, 3, L]).

    The three rows of token ids are the whole prompt, the prompt without its word for the slant, and the empty prompt,
    which stand in training at the rates `1 - short - empty`, `short` and `empty` (Ho and Salimans 2022, alg. 1).

    Args:
        network: one module that holds text encoders and denoiser, so that they are optimised and averaged together.
    """

    def __init__(self, network: nn.Module, *, short: float = 0.1, empty: float = 0.1, **settings) -> None:
        super().__init__(network, **settings)
        self.short, self.empty = short, empty

    def choose_prompts(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Take one row of token ids [N, 3, L] for each image, [N, L]."""
        draw = torch.rand(len(ids), generator=generator)
        row = (draw < self.short + self.empty).long() + (draw < self.empty).long()
        return ids[torch.arange(len(ids)), row.to(ids.device)]

    @staticmethod
    def stratified(n: int, generator: torch.Generator) -> Tensor:
        """Draw one number from each n-th of (0, 1), float64 [n]: the loss varies less than with n free draws."""
        return (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n


class VelocityTraining(PromptedTraining):
    """v-prediction (Salimans and Ho 2022, eq. 12) on the time steps of `scheduler`, a `diffusers` DDIMScheduler.

    `network` maps (x_t, t, token ids) to the estimate of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.
    """

    def __init__(self, network: nn.Module, scheduler, **settings) -> None:
        super().__init__(network, **settings)
        self.scheduler = scheduler

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x0, ids = batch
        generator = sample_generator(self.seed, self.global_step)
        total = self.scheduler.config.num_train_timesteps
        t = (self.stratified(len(x0), generator) * total).long().to(self.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t, v = self.scheduler.add_noise(x0, eps, t), self.scheduler.get_velocity(x0, eps, t)
        return self.report_loss(F.mse_loss(self.network(x_t, t, self.choose_prompts(ids, generator)), v))


class FlowTraining(PromptedTraining):
    """Rectified flow: x = (1 - sigma) x_0 + sigma eps, estimated velocity eps - x_0, logit-normal sigma.

    Esser et al. 2024, eq. 13 and 19. `network` maps (x, 1000 sigma, token ids, length) to the velocity.
    `StableDiffusion3Pipeline` fills T5's prompt up to `max_sequence_length`, 256 by default; the length is drawn for
    each step, mostly the shortest, so that the network learns to overlook the filling.
    """

    LENGTHS, RATES = (12, 24, 48, 96, 256), (0.8, 0.1, 0.05, 0.03, 0.02)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x0, ids = batch
        generator = sample_generator(self.seed, self.global_step)
        sigma = torch.special.ndtri(self.stratified(len(x0), generator)).sigmoid().to(x0)
        length = self.LENGTHS[int(torch.multinomial(torch.tensor(self.RATES), 1, generator=generator))]
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        level = sigma.view(-1, 1, 1, 1)
        velocity = self.network(
            (1 - level) * x0 + level * eps, 1000 * sigma, self.choose_prompts(ids, generator), length
        )
        return self.report_loss(F.mse_loss(velocity, eps - x0))
