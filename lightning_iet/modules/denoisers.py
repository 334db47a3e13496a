"""What can be known of a denoiser before it is trained: the images that fit it."""

from typing import Any

from torch import nn

__all__ = ["check_denoiser", "check_image_shape", "image_shape_of"]


def image_shape_of(denoiser: nn.Module) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of the images, from the denoiser's ``config``; None if that does not say.

    Example:
        >>> image_shape_of(nn.Identity()) is None
        True
    """
    config = getattr(denoiser, "config", None)
    size = getattr(config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width  # type: ignore[union-attr]


def check_denoiser(denoiser: nn.Module) -> None:
    """Refuse a denoiser that cannot be trained or sampled from.

    Raises:
        ValueError: If it predicts other channels than those of the images, or its own ``sample_size`` does not fit it.
    """
    config: Any = getattr(denoiser, "config", None)
    inside, outside = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if inside is not None and outside is not None and inside != outside:
        also = ": it also predicts a variance, which is not supported" if outside == 2 * inside else ""
        raise ValueError(
            f"Argument `unet` expected as many output channels as input channels, {inside}, but got {outside}{also}. "
            f"Set `out_channels` to {inside}."
        )
    shape = image_shape_of(denoiser)
    if shape is not None:
        check_image_shape(denoiser, shape)


def check_image_shape(denoiser: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse images that do not fit a network of diffusers; of other denoisers nothing is known.

    Args:
        denoiser: The network.
        shape: ``(C, H, W)`` of the images.

    Raises:
        ValueError: If it has other channels, cannot halve the images as often as it has to, or takes one size only.

    Example:
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
        >>> unet = UNet2DModel(block_out_channels=(4, 4, 4), norm_num_groups=2, add_attention=False, **blocks)
        >>> check_image_shape(unet, (3, 32, 30))
        Traceback (most recent call last):
        ...
        ValueError: Argument `unet` expected images whose height and width are multiples of 4 (it halves them 2 times),
        but got 32 × 30. ...
    """
    config: Any = getattr(denoiser, "config", None)
    if config is None or len(shape) != 3:
        return
    channels, height, width = shape
    if getattr(config, "in_channels", channels) != channels:
        raise ValueError(
            f"Argument `unet` expected images with {config.in_channels} channels, but got {channels}. "
            f"Set its `in_channels` and `out_channels` to {channels}, or convert the images."
        )
    if hasattr(config, "patch_size"):  # a transformer, with one position embedding for each patch
        expected = image_shape_of(denoiser)
        if (expected is not None and (height, width) != expected[1:]) or height % config.patch_size:
            raise ValueError(
                f"Argument `unet` expected square images of its `sample_size` {config.sample_size}, a multiple of its "
                f"`patch_size` {config.patch_size}, but got {height} × {width}. Set it to the size of the images."
            )
    elif hasattr(config, "down_block_types"):
        halvings = len(config.down_block_types) - 1
        factor = 2**halvings
        if height % factor or width % factor:
            raise ValueError(
                f"Argument `unet` expected images whose height and width are multiples of {factor} (it halves them "
                f"{halvings} times), but got {height} × {width}. Resize the images, or take fewer blocks."
            )
