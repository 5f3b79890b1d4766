"""Small diffusers folders with random weights, and how to change the settings in them."""

import json
from pathlib import Path

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

# states of random networks stay of the size of images: alpha_bar ends at 0.35
BETAS = {"beta_start": 1e-4, "beta_end": 0.002}
_DOWN, _UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
_KL = {"block_out_channels": (4, 8), "down_block_types": _DOWN, "up_block_types": _UP, "norm_num_groups": 4}
AUTOENCODERS = {
    "VQModel": (VQModel, _KL | {"num_vq_embeddings": 16}),
    "VQModel spatial": (VQModel, _KL | {"num_vq_embeddings": 16, "norm_type": "spatial", "lookup_from_codebook": True,
                                        "scaling_factor": 0.7, "block_out_channels": (32, 32)}),
    "AutoencoderKL": (AutoencoderKL, _KL | {"scaling_factor": 0.5}),
    "AutoencoderKL bare": (AutoencoderKL, _KL | {"use_quant_conv": False, "use_post_quant_conv": False}),
    "AutoencoderTiny": (AutoencoderTiny, {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4),
                                          "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}),
    "AsymmetricAutoencoderKL": (AsymmetricAutoencoderKL, {
        "down_block_types": _DOWN, "up_block_types": _UP, "down_block_out_channels": (4, 8),
        "up_block_out_channels": (4, 8), "norm_num_groups": 4}),
    "AutoencoderDC": (AutoencoderDC, {
        "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
        "encoder_out_shortcut": False, "decoder_in_shortcut": False}),
}


def unet(seed=0, **settings):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                          "attention_head_dim": 8, **blocks, **settings}).eval()


def autoencoder(which="VQModel", **settings):
    torch.manual_seed(1)
    cls, own = AUTOENCODERS[which]
    return cls(**{"latent_channels": 3, **own, **settings}).eval()


def transformer(**settings):
    torch.manual_seed(2)
    network = DiTTransformer2DModel(**{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3,
                                       "out_channels": 6, "num_layers": 2, "sample_size": 8, **settings})
    with torch.no_grad():  # its last layers are zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def ddim(**settings) -> DDIMScheduler:
    """A scheduler that clips nothing, with the betas of DDPM unless others are given."""
    return DDIMScheduler(**{"clip_sample": False} | settings)


def pixel_folder(path, scheduler=None, pipeline=DDPMPipeline, save=None, network=None, **settings) -> Path:
    """A pipeline of a U-Net on pixels: `network`, or one of these settings."""
    network = unet(**settings) if network is None else network
    pipeline(network, scheduler or DDIMScheduler(**BETAS)).save_pretrained(path, **save or {})
    return Path(path)


def latent_folder(path, scheduler=None, which="VQModel", first_stage=None, **settings) -> Path:
    """LDM: a U-Net on the latents of an autoencoder."""
    first_stage = first_stage or autoencoder(which)
    LDMPipeline(first_stage, unet(**settings), scheduler or ddim(**BETAS)).save_pretrained(path)
    return Path(path)


def dit_folder(path, scheduler=None, which="AutoencoderKL", **settings) -> Path:
    """A class-conditional transformer; 1000 classes, the number that diffusers' own pipeline is made for."""
    DiTPipeline(transformer(**settings), autoencoder(which), scheduler or ddim(**BETAS)).save_pretrained(path)
    return Path(path)


def edit(root, file, **changes) -> Path:
    """Change settings of a JSON file below `root`; `...` deletes one."""
    path = Path(root) / file
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return Path(root)
