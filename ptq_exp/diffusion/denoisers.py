"""Networks of `diffusers` as denoisers eps(x, t, **conditions), and autoencoders as first stages."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn


def _eps(output, x: Tensor) -> Tensor:
    """Return the noise estimate without learned-variance channels, in the type of the state."""
    return output.sample[:, : x.shape[1]].to(x.dtype)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


class UNetDenoiser(nn.Module):
    """A `diffusers` U-Net as a function eps(x, t, **conditions).

    x float [N, C, H, W], t float [N] network time, conditions [N, ...] under the names of the network's own arguments
    -> eps [N, C, H, W] of the type of x. The network computes in the type of its own weights.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        # an argument without a default in some U-Nets with cross-attention, where None means none
        context = inspect.signature(unet.forward).parameters.get("encoder_hidden_states")
        required = context is not None and context.default is context.empty
        self.absent = {"encoder_hidden_states": None} if required else {}

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        dtype = _dtype(self.unet)
        given = {name: _in_type(value, dtype) for name, value in conditions.items()}
        return _eps(self.unet(x.to(dtype), t, **self.absent | given), x)


class LabelledUNet(UNetDenoiser):
    """A U-Net that embeds class labels itself; as `UNetDenoiser`, with y int64 [N].

    `default_label` stands for y = None; None = a label is always needed.
    """

    def __init__(self, unet: nn.Module, default_label: int | None = None) -> None:
        super().__init__(unet)
        self.default_label = default_label

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **conditions: Tensor) -> Tensor:
        if self.default_label is not None:
            y = _labels(x, y, self.default_label)
        return super().forward(x, t, class_labels=y, **conditions)


class ClassConditionalUNet(nn.Module):
    """A cross-attention U-Net with a learned class embedding [classes + 1, D] as its context, as in latent diffusion.

    As `UNetDenoiser`, with y int64 [N]; the last row of the embedding means "no class", and so does y = None.
    """

    def __init__(self, unet: nn.Module, class_embedding: nn.Embedding) -> None:
        super().__init__()
        self.unet, self.class_embedding = unet, class_embedding

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        y = _labels(x, y, self.class_embedding.num_embeddings - 1)
        context = self.class_embedding(y)[:, None]
        return _eps(self.unet(x.to(_dtype(self.unet)), t, encoder_hidden_states=context), x)


class DiTDenoiser(nn.Module):
    """A class-conditional diffusion transformer (Peebles and Xie 2023); as `ClassConditionalUNet`."""

    def __init__(self, transformer: nn.Module, null_label: int) -> None:
        super().__init__()
        self.transformer, self.null_label = transformer, null_label

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        y = _labels(x, y, self.null_label)
        return _eps(self.transformer(x.to(_dtype(self.transformer)), timestep=t, class_labels=y), x)


def _in_type(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a condition in the type of the network; labels stay whole numbers."""
    return value.to(dtype) if value is not None and value.is_floating_point() else value


def _labels(x: Tensor, y: Tensor | None, null_label: int) -> Tensor:
    return torch.full((len(x),), null_label, device=x.device) if y is None else y


class FirstStage(nn.Module):
    """An autoencoder between images in [-1, 1] and the latents that a latent diffusion model works on.

    Args:
        autoencoder: a `diffusers` `VQModel` (decoding picks the nearest codebook vectors), `AutoencoderKL`,
            `AsymmetricAutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`.
        scaling_factor: latents are multiplied by it after encoding.
    """

    def __init__(self, autoencoder: nn.Module, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.autoencoder, self.scaling_factor = autoencoder, scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float [N, C, H, W] in [-1, 1] -> latents; the mode where the encoder gives a distribution."""
        encoded = self.autoencoder.encode(images)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode() * self.scaling_factor
        return (encoded.latents if hasattr(encoded, "latents") else encoded.latent) * self.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images float [N, C, H, W], about [-1, 1], not clamped."""
        return self.autoencoder.decode(z / self.scaling_factor).sample
