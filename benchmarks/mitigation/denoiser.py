"""The denoiser: a small U-Net of diffusers, over pixels or over patches of them."""

from types import SimpleNamespace
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting


class Patches(nn.Module):
    """Lets a U-Net see squares of p × p pixels as one pixel with p² channels, which takes p² times less work.

    As in Luhman & Luhman (2022), *Improving Diffusion Model Efficiency Through Patching*, arXiv:2207.04316.
    """

    def __init__(self, unet: nn.Module, patch: int, size: int) -> None:
        super().__init__()
        self.unet = unet
        self.patch = patch
        self.config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=size)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """Predict from images ``(B, 1, H, W)``."""
        patches = F.pixel_unshuffle(images, self.patch)
        return F.pixel_shuffle(self.unet(patches, timesteps).sample, self.patch)


def make_denoiser(setting: Setting, row: Row) -> nn.Module:
    """The setting's U-Net, with the row's width and dropout."""
    channels = tuple(round(width * row.width) for width in setting.channels)
    return small_unet(
        setting,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=min(8, channels[0]),
        dropout=row.dropout,
        add_attention=False,
    )


def small_unet(setting: Setting, **options: Any) -> nn.Module:
    """A U-Net of diffusers for the setting's images, over pixels or over patches of them."""
    inside = setting.patch**2
    unet = UNet2DModel(
        sample_size=setting.image_size // setting.patch,
        in_channels=inside,
        out_channels=inside,
        layers_per_block=setting.layers,
        **options,
    )
    return Patches(unet, setting.patch, setting.image_size) if setting.patch > 1 else unet
