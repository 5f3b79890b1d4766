"""The embedded networks with fewer levels and layers, for whole experiments whose numbers do not matter."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hydra._internal.hydra import Hydra
from matplotlib.figure import Figure
from PIL import Image
from quick_yaml import use_quick_yaml
from torch import nn

from ptq_exp.diffusion import ClassConditionalUNet
from ptq_exp.embedded import latent, load
from ptq_exp.quantization.ranges import search


def small_pixel_unet() -> UNet2DModel:
    """A U-Net on images of 16x16 with every kind of layer that the embedded one has."""
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, norm_num_groups=8, resnet_time_scale_shift="scale_shift",
    )


def small_latent_unet() -> ClassConditionalUNet:
    """A U-Net on latents of 8x8, conditioned on the class as the embedded one is."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2,
    )
    return ClassConditionalUNet(unet, nn.Embedding(11, 32))


def use_small_networks(monkeypatch) -> None:
    """Give the embedded models small networks of random weights; first stage and classifier stay as they are."""
    for module, name, build in [
        (load, "build_unet", small_pixel_unet), (latent, "build_latent_unet", small_latent_unet)
    ]:
        kind, read = type(build()), module.load_weights

        def small(network, path, kind=kind, read=read):
            return read(network, path) if type(network) is not kind else "small"

        def seeded(build=build):
            torch.manual_seed(0)
            return build()

        monkeypatch.setattr(module, name, seeded)
        monkeypatch.setattr(module, "load_weights", small)


def use_few_candidate_ranges(monkeypatch) -> None:
    """Let the search of ranges try as few candidates as it can, whatever the metric."""
    for name in ("BUDGET", "COARSE_BUDGET", "ENDS_BUDGET", "COARSE_SPACING"):
        monkeypatch.setattr(search, name, 1)


def use_blank_pictures(monkeypatch) -> None:
    """Write figures as empty pictures of their size: what is drawn is tested in tests/reports and experiment files."""

    def savefig(figure, target, *, format, **metadata):
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        if format == "svg":
            target.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"/>'.encode())
        else:
            Image.new("L", (width, height)).save(target, format)

    monkeypatch.setattr(Figure, "savefig", savefig)


def use_one_composition(monkeypatch) -> None:
    """Keep Hydra from composing all settings twice, the first time for `hydra.mode` alone, which none of ours sets."""
    monkeypatch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
    use_quick_yaml(monkeypatch)
