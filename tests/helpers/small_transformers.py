"""Networks of `diffusers` pipelines in miniature, of random weights, called as network(x, t, **conditions)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

TEXT = 12


class Adapted(nn.Module):
    """A component called with a state, a time and batch-first conditions; `call` makes its own arguments of them."""

    def __init__(self, component: nn.Module, call: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.component, self.call = component, call

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return self.component(**self.call(x, t, **conditions), return_dict=False)[0]


class Controlled(nn.Module):
    """A U-Net and a ControlNet, whose residuals it is called with."""

    def __init__(self, unet: nn.Module, control: nn.Module) -> None:
        super().__init__()
        self.unet, self.control = unet, control

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, image: Tensor) -> Tensor:
        down, middle = self.control(x, t, encoder_hidden_states, image, return_dict=False)
        return self.unet(
            x, t, encoder_hidden_states, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


def _sample(x: Tensor, t: Tensor, **conditions: Tensor) -> dict[str, Any]:
    return {"sample": x, "timestep": t, **conditions}


def _hidden(x: Tensor, t: Tensor, **conditions: Tensor) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": t, **conditions}


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2, **settings,
    })


def sd15() -> nn.Module:
    return Adapted(_unet(), _sample)


def sd21() -> nn.Module:
    return Adapted(_unet(attention_head_dim=(1, 2), use_linear_projection=True, upcast_attention=True), _sample)


def sdxl() -> nn.Module:
    def call(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor):
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return _sample(x, t, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added)

    return Adapted(_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + TEXT, use_linear_projection=True, attention_head_dim=(1, 2),
    ), call)


def pixart() -> nn.Module:
    """Encoder attention mask included; text and size as the Alpha model has them."""
    def call(x: Tensor, t: Tensor, resolution: Tensor, aspect_ratio: Tensor, **text: Tensor):
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return _hidden(x, t, added_cond_kwargs=added, **text)

    return Adapted(PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=8, caption_channels=TEXT, norm_num_groups=1,
        use_additional_conditions=True,
    ), call)


def sd3() -> nn.Module:
    """As SD3.5: normalised q and k, dual attention in the first block."""
    return Adapted(SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    ), _hidden)


def flux() -> nn.Module:
    """Called with ids that have no batch axis, and guidance."""
    def call(x: Tensor, t: Tensor, **conditions: Tensor):
        height = width = int(x.shape[1] ** 0.5)
        img_ids = torch.zeros(height, width, 3)
        img_ids[..., 1] += torch.arange(height)[:, None]
        img_ids[..., 2] += torch.arange(width)
        txt_ids = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3)
        return _hidden(x, t, img_ids=img_ids.flatten(0, 1), txt_ids=txt_ids, **conditions)

    return Adapted(FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ), call)


def sana() -> nn.Module:
    return Adapted(SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=TEXT,
        sample_size=8,
    ), _hidden)


def dit() -> nn.Module:
    return Adapted(DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    ), _hidden)


def unconditional() -> nn.Module:
    return Adapted(UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    ), _sample)


def controlnet() -> nn.Module:
    unet = _unet()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    return Controlled(unet, control)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "sd15": (sd15, {"encoder_hidden_states": (5, TEXT)}),
    "sd21": (sd21, {"encoder_hidden_states": (5, TEXT)}),
    "sdxl": (sdxl, {"encoder_hidden_states": (5, TEXT), "text_embeds": (TEXT,), "time_ids": (6,)}),
    "pixart": (pixart, {"encoder_hidden_states": (5, TEXT), "encoder_attention_mask": (5,), "resolution": (2,),
                        "aspect_ratio": (1,)}),
    "sd3": (sd3, {"encoder_hidden_states": (5, TEXT), "pooled_projections": (10,)}),
    "flux": (flux, {"encoder_hidden_states": (5, TEXT), "pooled_projections": (10,), "guidance": ()}),
    "sana": (sana, {"encoder_hidden_states": (5, TEXT), "encoder_attention_mask": (5,)}),
    "dit": (dit, {"class_labels": ()}),
    "unet": (unconditional, {}),
    "controlnet": (controlnet, {"encoder_hidden_states": (5, TEXT), "image": (3, 16, 16)}),
}
"""Name -> what builds the network, and the shape of each condition of one sample."""


def built(name: str) -> nn.Module:
    """The network called `name` with fixed random weights, those that start from zero included."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def call_of(name: str, n: int = 1, seed: int = 1) -> tuple:
    """(x, t, conditions) of `n` samples."""
    made = torch.Generator().manual_seed(seed)
    conditions = {key: torch.randn(n, *shape, generator=made) for key, shape in NETWORKS[name][1].items()}
    if "encoder_attention_mask" in conditions:
        conditions["encoder_attention_mask"] = torch.ones(n, 5)
        conditions["encoder_attention_mask"][:, 3:] = 0
    if "class_labels" in conditions:
        conditions["class_labels"] = torch.arange(n) % 10
    shape = (16, 8) if name == "flux" else (4, 8, 8)
    x, t = torch.randn(n, *shape, generator=made), torch.linspace(20, 900, n)
    return x, t / 1000 if name == "flux" else t, conditions
