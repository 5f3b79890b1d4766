"""What a state dict looks like: known checkpoints recognised by a few names and shapes, for error messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

State = Mapping[str, Tensor]
_OPENAI, _LATENT = "input_blocks.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight"


def looks_like(state: State) -> str:
    """One phrase about the origin of a state dict."""
    for signature, describe in _FAMILIES.items():
        if signature in state:
            return describe(state)
    if any(key.startswith("first_stage_model.") or key.startswith("encoder.down.") for key in state):
        return "a first stage (autoencoder) of latent diffusion alone"
    return f"no known checkpoint (it starts with {', '.join(list(state)[:2])})"


def _shape(state: State, key: str, axis: int) -> int:
    """Length of one axis, 0 where there is no such tensor or axis."""
    shape = state[key].shape if key in state else ()
    return shape[axis] if len(shape) > axis else 0


def _openai(state: State) -> str:
    if not any(".op.weight" in key for key in state):
        return "a guided-diffusion network (resolution changed by residual blocks)"
    if "label_emb.weight" in state:
        return "a class-conditional improved-diffusion or guided-diffusion network"
    width, coarsest = _shape(state, _OPENAI, 0), _shape(state, "middle_block.0.in_layers.0.weight", 0)
    blocks = {key.split(".")[1] for key in state if key.startswith("output_blocks.")}
    named = {(128, 256): "improved-diffusion CIFAR-10 (ddim_cifar10)",
             (128, 512): "improved-diffusion ImageNet-64 (ddim_imagenet64)"}.get((width, coarsest))
    return named if named and len(blocks) == 16 else "another improved-diffusion network"


def _latent(state: State) -> str:
    width, channels = _shape(state, _LATENT, 0), _shape(state, _LATENT, 1)
    context = next((value.shape[-1] for key, value in state.items() if key.endswith("attn2.to_k.weight")), None)
    codebook = _shape(state, "first_stage_model.quantize.embedding.weight", 0)
    if any(key.startswith(("cond_stage_model.transformer.text_model", "cond_stage_model.model.")) for key in state):
        return "Stable Diffusion or another text-to-image model"
    if context in (768, 1024):
        return "Stable Diffusion or another text-to-image model"
    if context is None:
        return "an unconditional latent diffusion model" + (" (LSUN)" if width == 224 else "")
    if (width, channels) == (256, 4) or codebook == 16384:
        return "LDM-8 `cin256`, an older ImageNet model of latent diffusion; LDM-4 `cin256-v2` is another file"
    if (width, channels, context) == (192, 3, 512):
        return "LDM-4 `cin256-v2` (ldm4_imagenet256)"
    return "another conditional latent diffusion model"


def _ermongroup(state: State) -> str:
    cifar = _shape(state, "conv_in.weight", 0) == 128 and "down.3.block.0.conv1.weight" in state
    if cifar and "down.4.block.0.conv1.weight" not in state:
        return "DDIM CIFAR-10 in the PyTorch layout of ermongroup (ddpm_cifar10)"
    return "another DDIM / DDPM network in the PyTorch layout of ermongroup"


def _diffusers(state: State) -> str:
    if _shape(state, "conv_in.weight", 1) == 1:
        return "the digits model of this package (digits), or another one-channel U-Net of diffusers"
    return "a U-Net in the layout of diffusers; give its folder to the model `diffusers`"


_FAMILIES: dict[str, Callable[[State], str]] = {
    _LATENT: _latent,
    _OPENAI: _openai,
    "temb.dense.0.weight": _ermongroup,
    "down_blocks.0.resnets.0.conv1.weight": _diffusers,
    "encoder.down_blocks.0.resnets.0.conv1.weight": lambda _: "an autoencoder in the layout of diffusers",
    "pos_embed.proj.weight": lambda _: "a DiT in the layout of diffusers; give its folder to the model `diffusers`",
    "x_embedder.proj.weight": lambda _: "a DiT in its original layout; the model `diffusers` reads the converted one",
}
