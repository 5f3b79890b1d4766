"""Lightning modules that train the embedded networks (denoising score matching, classification), with EMA."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ptq_exp.diffusion.noise import sample_generator


def warmup_stable_decay(step: int, *, warmup: int, total: int, decay_share: float = 0.3) -> float:
    """Return the learning-rate factor: linear warm-up, constant, linear decay to 1 % over the last `decay_share`."""
    decay_start = total * (1 - decay_share)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return max(0.01, (total - step) / (total - decay_start))


class EMATraining(pl.LightningModule):
    """Shared part: the network, its exponential moving average (saved with it), AdamW, learning-rate schedule."""

    def __init__(self, network: nn.Module, *, seed: int, lr: float, total_steps: int, ema_decay: float) -> None:
        super().__init__()
        self.network = network
        self.ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
        self.ema.requires_grad_(False)
        self.seed, self.lr, self.total_steps = seed, lr, total_steps
        self.loss_history: list[float] = []

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_stable_decay(step, warmup=200, total=self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # dropout draws from the global generator, which no checkpoint restores
        torch.manual_seed(sample_generator(self.seed, self.global_step, 1).initial_seed())

    def on_train_batch_end(self, outputs: object, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.global_step >= self.total_steps:
            self.trainer.should_stop = True

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.network)

    def report_loss(self, loss: Tensor) -> Tensor:
        self.log("loss", loss, prog_bar=True)
        self.loss_history.append(float(loss.detach()))
        return loss

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["loss_history"] = self.loss_history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.loss_history = list(checkpoint["loss_history"])


class DenoiserTraining(EMATraining):
    """Noise prediction, L_simple of Ho et al. 2020 (eq. 14), with time steps stratified over the batch."""

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, **kwargs) -> None:
        super().__init__(network, **kwargs)
        self.register_buffer("alphas_cumprod", alphas_cumprod)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x0, labels = batch
        generator = sample_generator(self.seed, self.global_step)
        n, total = len(x0), len(self.alphas_cumprod)
        # one draw per n-th of the schedule: the loss varies much less between batches than with n free draws
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) * total / n).long()
        t = t.clamp(max=total - 1).to(self.device)  # float32 rounds n - 1 + 0.9999999 to n
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        return self.report_loss(F.mse_loss(self.estimate(x_t, t, labels, generator), eps))

    def estimate(self, x_t: Tensor, t: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Estimate the noise, [N, C, H, W]; draws of a subclass come from `generator`."""
        return self.network(x_t, t).sample


class ClassifierTraining(EMATraining):
    """Cross-entropy under small random shifts, rotations and scalings; logs the EMA's held-out accuracy."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        images = _random_affine(images, sample_generator(self.seed, self.global_step))
        return self.report_loss(F.cross_entropy(self.network(images).logits, labels))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        correct = (self.ema(images).logits.argmax(1) == labels).float().mean()
        self.log("accuracy", correct, prog_bar=True, batch_size=len(labels))


def _random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10 degrees, scale by up to 10 % and shift by up to 1.5 of 16 pixels; paper (-1) comes in."""
    n = len(images)
    draw = 2 * torch.rand(4, n, generator=generator).to(images) - 1
    angle, scale, shift = draw[0] * 0.175, 1 + 0.1 * draw[1], draw[2:] * (1.5 / 8)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
