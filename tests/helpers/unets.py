"""Denoisers with blocks for tests: those of Stable Diffusion by their configurations, and small ones."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
SD21 = SD15 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}

# CIFAR-10's of the DDPM paper.
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def without_memory(network, config):
    """A network of diffusers with shapes, and no weights."""
    with torch.device("meta"):
        return network(**config)


def seeded(network, seed=0, **config):
    """A network of diffusers with random weights, biases and norms included, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = network(**config)
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def small_sd_unet(seed=0, **kwargs):
    """A U-Net with Stable Diffusion's blocks, 8 and 16 channels wide."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 16, 16),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return seeded(UNet2DConditionModel, seed, **(SD15 | config | kwargs))


def small_pixel_unet(seed=0, **kwargs):
    """A U-Net for images, with attention in its second level."""
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return seeded(UNet2DModel, seed, **(config | kwargs))


def small_dit(seed=0, **kwargs):
    """A diffusion transformer with three blocks."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 1,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 4,
        "norm_num_groups": 1,
        "num_embeds_ada_norm": 10,
    }
    return seeded(DiTTransformer2DModel, seed, **(config | kwargs))
