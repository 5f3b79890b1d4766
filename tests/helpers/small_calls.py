"""Small networks of other calls than (x, t) -> eps: other predictions, labels, embedded prompts."""

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

WIDTH = 12


def conditional_unet(**settings) -> UNet2DConditionModel:
    """With cross-attention to tokens of WIDTH channels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 8, "cross_attention_dim": WIDTH, **blocks, **settings,
    }).eval()


def labelled_conditional_unet(**settings) -> UNet2DConditionModel:
    """Without cross-attention: class labels alone."""
    return conditional_unet(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D", num_class_embeds=4, **settings,
    )


def bare_folder(path, network, scheduler=None):
    """A network alone, with its scheduler beside it."""
    network.save_pretrained(path)
    (scheduler or DDIMScheduler(beta_end=0.002, clip_sample=False)).save_pretrained(path / "scheduler")
    return path


def tokens(path, k=2, **more):
    """An `.npz` file of k embedded prompts of four tokens."""
    rows = np.random.default_rng(0).standard_normal((k, 4, WIDTH)).astype(np.float32)
    np.savez(path, encoder_hidden_states=rows, **more)
    return path
