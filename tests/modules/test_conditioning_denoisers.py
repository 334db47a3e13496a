import pytest
import torch
from torch import nn

from lightning_iet import DiffusionModule
from lightning_iet.modules.conditioning import check_image_shape, image_shape_of
from tests.helpers.models import tiny_diffusion, tiny_dit, tiny_unet

TWO_LEVELS = {
    "block_out_channels": (4, 4),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, (4, 12)])
def test_any_channels_and_sides(channels, size):
    module = tiny_diffusion(unet=TWO_LEVELS | {"in_channels": channels, "out_channels": channels, "sample_size": size})
    shape = (channels, 8, 8) if size == 8 else (channels, 4, 12)
    assert module.image_shape == shape
    assert module.sample(2, num_inference_steps=2).shape == (2, *shape)
    images = torch.rand(3, *shape)
    assert module.losses(images, torch.arange(3), torch.randn_like(images)).shape == (3,)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"out_channels": 2}, r"as many output channels as input channels, 1, but got 2: it also predicts a variance"),
        ({"out_channels": 3}, r"as many output channels as input channels, 1, but got 3\. "),
        (TWO_LEVELS | {"sample_size": 7}, r"multiples of 2 \(it halves them 1 times\), but got 7 × 7"),
        (TWO_LEVELS | {"sample_size": (8, 5)}, r"multiples of 2 .* but got 8 × 5"),
    ],
)
def test_networks_that_cannot_work_are_refused_when_they_are_built(unet, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModule(tiny_unet(**unet))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"images with 1 channels, but got 3"),
        ((1, 9, 8), r"multiples of 2 .* but got 9 × 8"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_the_first_batch(shape, message):
    module = tiny_diffusion(unet=TWO_LEVELS)
    with pytest.raises(ValueError, match=message):
        module.training_step((torch.rand(2, *shape),))


def test_a_transformer_takes_one_size():
    check_image_shape(tiny_dit(), (1, 8, 8))
    with pytest.raises(ValueError, match=r"`sample_size` 8, a multiple of its `patch_size` 2, but got 8 × 10"):
        check_image_shape(tiny_dit(), (1, 8, 10))
    with pytest.raises(ValueError, match=r"`sample_size` 9, a multiple of its `patch_size` 2, but got 9 × 9"):
        DiffusionModule(tiny_dit(sample_size=9))


def test_nothing_is_known_of_other_denoisers():
    check_image_shape(nn.Identity(), (5, 3, 2))
    assert image_shape_of(nn.Identity()) is None
