"""Pipelines of Stable Diffusion in one file, in the form in which it was first published."""

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _resnet(rest):
    name, _, end = rest.rpartition(".")
    return f"{RESNET[name]}.{end}"


def unet_name(name, layers, attentive):
    """Name of a weight of diffusers' U-Net in the original file; ``attentive``: upward blocks with attention."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if match:
        kind, at, rest = match.groups()
        return f"middle_block.{2 * int(at)}.{_resnet(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    where, block, kind, at, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
    per, block, at = layers + 1, int(block), int(at)
    number = block * per + at + (where == "down")
    side = "input_blocks" if where == "down" else "output_blocks"
    if kind == "resnets":
        return f"{side}.{number}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{side}.{number}.1.{rest}"
    if where == "down":
        return f"input_blocks.{block * per + layers + 1}.0.{rest.replace('conv', 'op')}"
    return f"output_blocks.{block * per + layers}.{2 if block in attentive else 1}.{rest}"


def vae_name(name, blocks):
    """Name of a weight of diffusers' autoencoder in the original file."""
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
    name = name.replace("down_blocks.", "down.").replace("downsamplers.0", "downsample")
    name = name.replace("upsamplers.0", "upsample").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets.", "block.")
    if "attn_1" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace("conv_shortcut", "nin_shortcut")


def write_single_file(pipeline, path):
    """Write the weights of a ``StableDiffusionPipeline``."""
    unet, vae = pipeline.unet, pipeline.vae
    attentive = {number for number, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    weights = {
        "model.diffusion_model." + unet_name(name, unet.config.layers_per_block, attentive): weight
        for name, weight in unet.state_dict().items()
    }
    for name, weight in vae.state_dict().items():
        theirs = vae_name(name, len(vae.config.block_out_channels))
        is_linear = "attn_1" in theirs and weight.ndim == 2
        weights[f"first_stage_model.{theirs}"] = weight[..., None, None] if is_linear else weight
    for name, weight in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
