"""The embedded networks: U-Net and classifier of `digits`, autoencoder and U-Net of `digits_ldm`, DiT of `digits_dit`.

`digits` is a small CIFAR-10 network, `digits_ldm` a small LDM-4, `digits_dit` a small DiT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ptq_exp.diffusion import ClassConditionalUNet, DiTDenoiser
from ptq_exp.embedded.digits import IMAGE_SIZE, LATENT_IMAGE_SIZE, N_CLASSES

if TYPE_CHECKING:  # imported where one is built: each of them brings seconds of what the others do without
    from diffusers import UNet2DModel, VQModel

TRAIN_STEPS = 1000
BETA_SCHEDULE = "squaredcos_cap_v2"
LATENT_CHANNELS = 3


def build_unet() -> UNet2DModel:
    """Build the `digits` noise predictor: 1.6 M parameters, random weights.

    It has every kind of layer of the CIFAR-10 network of improved-diffusion: three resolutions (16, 8, 4), two
    ResBlocks per level conditioned by scale and shift, self-attention, skip concatenations with 1x1 shortcuts.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(24, 48, 72),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=24,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        norm_eps=1e-5,
    )


def build_autoencoder() -> VQModel:
    """Build the first stage of `digits_ldm`, random weights: 32x32x1 images -> 8x8x3 latents, 256 codes.

    A small VQ-f4 (Rombach et al. 2022): three levels, attention in the middle, a codebook of three-dimensional vectors.
    """
    from diffusers import VQModel

    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=LATENT_IMAGE_SIZE,
        num_vq_embeddings=256,
        vq_embed_dim=LATENT_CHANNELS,
        norm_num_groups=8,
    )


def build_latent_unet() -> ClassConditionalUNet:
    """Build the noise predictor of `digits_ldm`, random weights: 8x8x3 latents, ten classes and "no class".

    As in LDM-4, a learned vector per class is the context of cross-attention in transformer blocks at every level.
    """
    from diffusers import UNet2DConditionModel

    context = 32
    unet = UNet2DConditionModel(
        sample_size=LATENT_IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return ClassConditionalUNet(unet, nn.Embedding(N_CLASSES + 1, context))


def build_dit() -> DiTDenoiser:
    """Build the noise predictor of `digits_dit`, random weights: the latents and classes of `digits_ldm`, 0.8 M.

    Four blocks of DiT (Peebles and Xie 2023) on 64 tokens of width 96; adaptive layer norms and the last layer start
    at zero, as there.
    """
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=LATENT_IMAGE_SIZE // 4, patch_size=1, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=4, num_attention_heads=4, attention_head_dim=24, norm_num_groups=8, num_embeds_ada_norm=N_CLASSES,
    )
    for block in transformer.transformer_blocks:
        # each block would drop labels by itself; whoever trains drops a sample's label in all of them
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for layer in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return DiTDenoiser(transformer, null_label=N_CLASSES)


class Features(NamedTuple):
    """What a metric needs of a batch: `pooled` [N, D] (FID), `spatial` [N, C, H, W] (sFID), `logits` [N, K] (IS)."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitsClassifier(nn.Module):
    """A small CNN: [N, 1, 16, 16] in [-1, 1] -> `Features` with D = 64, a 64 x 4 x 4 map and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(1, 32), _conv(32, 32, stride=2), _conv(32, 48), _conv(48, 64, stride=2))
        self.head = nn.Sequential(_conv(64, 64), nn.Dropout2d(0.2))
        self.classify = nn.Linear(64, N_CLASSES)

    def forward(self, images: Tensor) -> Features:
        spatial = self.stem(images)
        pooled = self.head(spatial).mean(dim=(2, 3))
        return Features(pooled, spatial, self.classify(pooled))
