"""Stable Diffusion 1.5 and XL in one file, with the names that their authors gave the weights."""

import re

import torch

_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj",
    "self_attn": "attn", "text_projection.weight": "text_projection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_state(pipe) -> dict[str, torch.Tensor]:
    """All weights of the pipeline by their original names."""
    unet, vae = pipe.unet, pipe.vae
    state = {f"model.diffusion_model.{_unet_name(name, unet)}": value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        name = _vae_name(name, len(vae.config.up_block_types))
        square = "mid.attn_1" in name and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if square else value
    xl = hasattr(pipe, "text_encoder_2")
    text = "conditioner.embedders.0" if xl else "cond_stage_model"
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"{text}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if xl:
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(pipe.text_encoder_2)}
    return {name: value.contiguous() for name, value in state.items()}


def _open_clip(encoder) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of a text encoder as OpenCLIP holds them: q, k and v in one matrix, the projection turned."""
    state, found = encoder.state_dict(), {}
    for name, value in state.items():
        for own, original in _OPEN_CLIP.items():
            name = name.replace(own, original)
        if name == "text_projection":
            value = value.T
        if part := re.fullmatch(r"(.*attn)\.([qkv])_proj\.(weight|bias)", name):
            found.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = value
        else:
            found[name] = value
    return [
        (name, torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value)
        for name, value in found.items()
    ]


def _unet_name(name: str, unet) -> str:
    layers = unet.config.layers_per_block + 1
    module, _, rest = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{rest}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = found.groups()
        block, layer, into = int(block), int(layer), "input_blocks" if side == "down" else "output_blocks"
        first = block * layers + (side == "down")
        if kind == "downsamplers":
            return f"{into}.{first + layers - 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            return f"{into}.{first + layers - 1}.{place}.{rest}"
        return f"{into}.{first + layer}.{_part(kind, rest)}"
    kind, layer, rest = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.*)", name).groups()
    return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{_part(kind, rest)[2:]}"


def _part(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    module, _, last = rest.partition(".")
    return f"0.{_RESNET[module]}.{last}"


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    found = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", name)
    return f"{found[1]}.mid.attn_1.{_ATTENTION[found[2]]}.{found[3]}" if found else name
