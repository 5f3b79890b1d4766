"""Pipelines of diffusers with random weights, of every architecture: built and drawn from in a fraction of a second."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPTS = ("low", "lowest newer", "wider low er")
_WORDS = ("low", "lowest", "newer", "wider", "er", "a", "red", "fox")
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """Byte pairs of a few words."""
    vocabulary = [
        *"lowerstidn", "lo", "l</w>", "w</w>", "r</w>", "t</w>", "low</w>", "er</w>", "lowest</w>", "newer</w>",
        "wider", "<unk>", "<|startoftext|>", "<|endoftext|>",
    ]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
        merges.write_text("#version: 0.2\nl o\nlo w</w>\ne r</w>\n")
        return CLIPTokenizer(str(vocab), str(merges), unk_token="<unk>", model_max_length=length)


def word_tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """One token for each word."""
    special = ("<pad>", "</s>", "<unk>", "<bos>")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*special, *_WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>",
        model_max_length=length,
    )


def clip_encoder(kind: type = CLIPTextModel, width: int = 32) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder of two layers."""
    return kind(CLIPTextConfig(
        bos_token_id=21, eos_token_id=22, pad_token_id=22, vocab_size=64, max_position_embeddings=77, hidden_size=width,
        intermediate_size=37, projection_dim=width, num_attention_heads=4, num_hidden_layers=2,
    )).eval()


def t5_encoder(width: int = 32) -> T5EncoderModel:
    """T5's encoder of one layer."""
    return T5EncoderModel(T5Config(
        vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
    )).eval()


def autoencoder(channels: int = 4, **settings) -> AutoencoderKL:
    """KL autoencoder that halves the size once."""
    return AutoencoderKL(**{
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": channels, "norm_num_groups": 4, **settings,
    }).eval()


def text_unet(**settings) -> UNet2DConditionModel:
    """U-Net with cross-attention, of latents of 8x8."""
    return UNet2DConditionModel(**{
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, **settings,
    }).eval()


def pixel_unet(**settings) -> UNet2DModel:
    """U-Net without conditions."""
    return UNet2DModel(**{
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **settings,
    }).eval()


def livened(network: torch.nn.Module) -> torch.nn.Module:
    """`network` with noise on all weights: those of gates and last layers begin as zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    """Noise in RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size: int = 16) -> Image.Image:
    """The left half."""
    return Image.fromarray(np.repeat(np.where(np.arange(size) < size // 2, 255, 0)[None], size, 0).astype(np.uint8))


def _sd_parts() -> dict:
    return {
        "vae": autoencoder(), "text_encoder": clip_encoder(), "tokenizer": clip_tokenizer(), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }


def sd15(scheduler=None, kind: type = StableDiffusionPipeline, unet: dict | None = None, **parts):
    """Stable Diffusion 1.5, with the DDIM scheduler; `kind`: another pipeline of the same parts."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**_SD_BETAS) if scheduler is None else scheduler
    return kind(unet=text_unet(**unet or {}), scheduler=scheduler, **(_sd_parts() | parts))


def sd15_pndm():
    """Stable Diffusion 1.5 as published: PNDM without Runge-Kutta steps evaluates the network twice in one step."""
    betas = {name: value for name, value in _SD_BETAS.items() if name != "clip_sample"}
    return sd15(PNDMScheduler(skip_prk_steps=True, **betas))


def sd21():
    """Stable Diffusion 2.1: v-prediction, and the zero terminal SNR of Lin et al. 2024."""
    scheduler = DDIMScheduler(**_SD_BETAS, prediction_type="v_prediction", timestep_spacing="trailing",
                              rescale_betas_zero_snr=True)
    return sd15(scheduler, unet={"use_linear_projection": True, "attention_head_dim": (2, 4)})


def sdxl():
    """Stable Diffusion XL: two text encoders, pooled embeddings and sizes as added conditions."""
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(), text_encoder_2=clip_encoder(CLIPTextModelWithProjection, 48),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(),
        unet=text_unet(
            cross_attention_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=96, use_linear_projection=True, transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         steps_offset=1, timestep_spacing="leading"),
    )


def pixart():
    """PixArt-Sigma: T5, learned variance, which the pipeline drops."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5_encoder(), vae=autoencoder(), transformer=livened(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def sd3(scheduler=None, t5: bool = False):
    """Stable Diffusion 3: joint attention, flow matching."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=64,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=livened(transformer), vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if scheduler is None else scheduler,
        text_encoder=clip_encoder(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64) if t5 else None, tokenizer_3=word_tokenizer() if t5 else None,
    )


def sd3_t5():
    """Stable Diffusion 3 with its third text encoder."""
    return sd3(t5=True)


def flux():
    """FLUX.1 [dev]: guidance as an embedding, positions of tokens as arguments."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=autoencoder(
            shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(), tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(),
        tokenizer_2=word_tokenizer(), transformer=livened(transformer),
    )


def sana():
    """SANA: linear attention, depthwise convolutions, deep-compression autoencoder, Gemma 2."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    ).eval()
    encoder = Gemma2Model(Gemma2Config(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, eos_token_id=1, bos_token_id=3,
    )).eval()
    return SanaPipeline(
        tokenizer=word_tokenizer(300), text_encoder=encoder, vae=vae, transformer=livened(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def dit():
    """DiT: class labels, 1000 of them, as the pipeline is made for."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
    )
    return DiTPipeline(livened(transformer), autoencoder(), DDIMScheduler(clip_sample=False))


def ldm():
    """Latent diffusion without conditions."""
    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16, latent_channels=3,
    ).eval()
    return LDMPipeline(vae, pixel_unet(), DDIMScheduler(clip_sample=False))


def ldm_text():
    """Latent diffusion from prompts, its autoencoder by the name vqvae."""
    torch.manual_seed(0)
    return LDMTextToImagePipeline(
        vqvae=autoencoder(), bert=clip_encoder(), tokenizer=clip_tokenizer(), unet=text_unet(),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def ddpm():
    """Ancestral sampling of pixels: noise in every step."""
    torch.manual_seed(0)
    return DDPMPipeline(pixel_unet(), DDPMScheduler())


def ddim():
    """DDIM on pixels."""
    torch.manual_seed(0)
    return DDIMPipeline(pixel_unet(), DDIMScheduler())


def img2img():
    """From a picture, which is noised by half."""
    return sd15(kind=StableDiffusionImg2ImgPipeline)


def inpaint():
    """Into a masked part of a picture, with the U-Net of nine channels."""
    return sd15(kind=StableDiffusionInpaintPipeline, unet={"in_channels": 9})


def controlnet():
    """With residuals of a second network, lists of tensors among the arguments."""
    torch.manual_seed(1)
    control = ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        conditioning_embedding_out_channels=(4, 8),
    )
    return sd15(kind=StableDiffusionControlNetPipeline, controlnet=livened(control))


class Small(NamedTuple):
    """A small pipeline: how it is built, and what it is called with.

    Attributes:
        build: from nothing; the same weights each time.
        call: arguments for all images.
        requests: arguments of each image; None = there are none.
    """

    build: Callable
    call: dict
    requests: tuple | None = PROMPTS


_SIZE = {"height": 16, "width": 16}
_GUIDED = _SIZE | {"guidance_scale": 3.0}
SMALL = {
    "sd15": Small(sd15, _GUIDED | {"negative_prompt": "wider"}),
    "sd15 pndm": Small(sd15_pndm, _GUIDED),
    "sd15 unguided": Small(sd15, _SIZE | {"guidance_scale": 1.0}),
    "sd21": Small(sd21, _GUIDED | {"guidance_rescale": 0.7}),
    "sdxl": Small(sdxl, _GUIDED | {"negative_prompt": "wider", "prompt_2": "low"}),
    "pixart": Small(pixart, _GUIDED | {
        "use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False}),
    "sd3": Small(sd3, _GUIDED),
    "sd3 t5": Small(sd3_t5, _GUIDED | {"max_sequence_length": 16}),
    "flux": Small(flux, _GUIDED | {"max_sequence_length": 16}),
    "flux true cfg": Small(flux, _GUIDED | {
        "max_sequence_length": 16, "negative_prompt": "wider", "true_cfg_scale": 2.0}),
    "sana": Small(sana, {
        "height": 32, "width": 32, "guidance_scale": 3.0, "use_resolution_binning": False, "max_sequence_length": 16,
        "complex_human_instruction": None}),
    "dit": Small(dit, {"guidance_scale": 3.0}, None),
    "dit labels": Small(dit, {"guidance_scale": 1.0}, tuple({"class_labels": label} for label in (7, 3, 999))),
    "ldm": Small(ldm, {}, None),
    "ldm text": Small(ldm_text, {"height": 64, "width": 64, "guidance_scale": 3.0}),
    "ddpm": Small(ddpm, {}, None),
    "ddim": Small(ddim, {"eta": 0.5}, None),
    "img2img": Small(img2img, {"strength": 0.6, "guidance_scale": 3.0}, tuple(
        {"prompt": prompt, "image": picture(i)} for i, prompt in enumerate(PROMPTS))),
    "inpaint": Small(inpaint, _GUIDED | {"image": picture(), "mask_image": mask()}),
    "controlnet": Small(controlnet, {"image": picture(), "guidance_scale": 3.0}),
}
