from functools import partial

import pytest
import torch
from torch import nn

from lightning_iet import DiffusionModule, DigitsDataModule
from lightning_iet.modules.conditioning import Conditioning, check_image_shape, find_conditioning, image_shape_of
from lightning_iet.modules.noise_processes import guided
from tests.helpers.models import quiet_trainer, tiny_diffusion, tiny_dit, tiny_unet


class Plain(nn.Module):
    def forward(self, x, t):
        return x


class WithOption(nn.Module):
    def forward(self, x, t, extra=None):
        return x if extra is None else x + extra.view(-1, 1, 1, 1)


class WithVector(nn.Module):
    """A condition that is no label."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 64)

    def forward(self, x, t, c):
        return x + self.net(c).view(-1, 1, 8, 8)


class WithKeyword(nn.Module):
    def forward(self, x, t, mask=None, class_labels=None):
        assert mask is None
        return x + class_labels.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("denoiser", "num_classes", "label_dropout", "expected"),
    [
        (Plain(), None, 0, None),
        (WithOption(), None, 0, None),
        (WithOption(), 4, 0, Conditioning(None, 4, 4)),
        (WithVector(), None, 0, Conditioning(None)),
        (WithKeyword(), 3, 0.1, Conditioning("class_labels", 3, 3)),
        (tiny_unet(), None, 0, None),
        (tiny_unet(num_class_embeds=10), None, 0, Conditioning("class_labels", 10, None)),
        (tiny_unet(num_class_embeds=11), None, 0.1, Conditioning("class_labels", 10, 10)),
        (tiny_unet(num_class_embeds=11), 10, 0, Conditioning("class_labels", 10, 10)),
        (tiny_dit(), None, 0, Conditioning("class_labels", 10, 10)),
    ],
)
def test_what_a_denoiser_takes(denoiser, num_classes, label_dropout, expected):
    assert find_conditioning(denoiser, num_classes=num_classes, label_dropout=label_dropout) == expected


@pytest.mark.parametrize(
    ("unet", "kwargs", "message"),
    [
        ({"num_class_embeds": 10}, {"num_classes": 10, "label_dropout": 0.1}, r"at least 11 .* but got 10"),
        ({"num_class_embeds": 10}, {"num_classes": 11}, r"at least 11 .* but got 10"),
        ({"num_class_embeds": 1}, {"label_dropout": 0.1}, r"at least 2 .* but got 1"),
        ({}, {"label_dropout": 0.1}, r"expected a denoiser of classes, but got 0.1 and None"),
        ({}, {"num_classes": 10}, r"expected a denoiser of classes, but got 0.0 and 10"),
        ({"class_embed_type": "timestep"}, {}, r"class_embed_type null\), but got 'timestep'"),
        ({"num_class_embeds": 10}, {"guidance_scale": 2.0}, r"`guidance_scale` expected 1 .* but got 2.0"),
        (
            {"num_class_embeds": 11},
            {"label_dropout": 1.5},
            r"`label_dropout` expected .* \[0, 1\], but got 1.5",
        ),
    ],
)
def test_settings_that_do_not_fit_the_denoiser(unet, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModule(tiny_unet(**unet), **kwargs)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_conditional_step_equals_a_ten_line_reference():
    module = tiny_diffusion(unet={"num_class_embeds": 11}, label_dropout=0.5)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    module.log = lambda *args, **kwargs: None
    torch.manual_seed(1)
    output = module.training_step((images, labels, torch.arange(6)))
    torch.manual_seed(1)
    t = torch.randint(1000, (6,))
    noise = torch.randn_like(images)
    dropped = torch.where(torch.rand(6) < 0.5, 10, labels)
    assert 0 < (dropped == 10).sum() < 6
    noisy = module.scheduler.add_noise(images * 2 - 1, noise, t)
    expected = (module.unet(noisy, t, class_labels=dropped).sample - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(output["sample_loss"], expected)


def test_random_draws_are_those_of_unconditional_training():
    plain, told = tiny_diffusion(), tiny_diffusion(unet={"num_class_embeds": 11}, label_dropout=0.1)
    drawn = []
    for module in (plain, told):
        module.log = lambda *args, **kwargs: None
        torch.manual_seed(0)
        drawn.append(module.training_step((torch.rand(4, 1, 8, 8), torch.arange(4)))["timesteps"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize("make", [lambda: tiny_unet(num_class_embeds=11), tiny_dit])
def test_classes_are_learnt_from_data(tmp_path, make):
    module = DiffusionModule(make(), label_dropout=0.1, ema_decay=0.5)
    before = [p.clone() for p in module.parameters()]
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=2)
    trainer.fit(module, DigitsDataModule(16, num_control=16, batch_size=8))
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert module.sample(2, num_inference_steps=2, labels=3, guidance_scale=2).shape == (2, 1, 8, 8)


def test_the_module_alone_decides_which_labels_a_transformer_loses():
    module = DiffusionModule(tiny_dit(), ema_decay=0).train()
    images, t, noise = torch.rand(64, 1, 8, 8), torch.full((64,), 500), torch.randn(64, 1, 8, 8)
    first = module.losses(images, t, noise, torch.zeros(64, dtype=torch.long))
    assert torch.equal(first, module.losses(images, t, noise, torch.zeros(64, dtype=torch.long)))


def test_conditions_of_any_kind_reach_a_denoiser_of_ones_own():
    module = DiffusionModule(WithVector(), ema_decay=0)
    module.log = lambda *args, **kwargs: None
    assert module.training_step((torch.rand(4, 1, 8, 8), torch.rand(4, 3)))["sample_loss"].shape == (4,)
    with pytest.raises(ValueError, match=r"`condition` expected one for each image, but got none"):
        module.losses(torch.rand(1, 1, 8, 8), torch.tensor([3]), torch.zeros(1, 1, 8, 8))


def test_labels_of_the_data_that_are_out_of_range_are_refused_before_the_first_step(tmp_path):
    module = tiny_diffusion(unet={"num_class_embeds": 5})
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"class labels 0 … 4, but got [5-9]"):
        trainer.fit(module, DigitsDataModule(16, num_control=16, batch_size=8))
    assert trainer.fit_loop.total_batch_idx < 0


def test_labels_that_only_held_out_images_have_are_refused_too(tmp_path):
    class OtherControl(DigitsDataModule):
        def setup(self, stage):
            super().setup(stage)
            every = DigitsDataModule(16, num_control=16)
            every.setup(stage)
            self.control_set = every.control_set

    module = tiny_diffusion(unet={"num_class_embeds": 5})
    data = OtherControl(16, num_control=16, batch_size=8, classes=range(5))
    with pytest.raises(ValueError, match=r"class labels 0 … 4, but got [5-9]"):
        quiet_trainer(tmp_path, num_sanity_val_steps=0).fit(module, data)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([1, 5]), ValueError, r"class labels 0 … 4, but got 5"),
        (torch.tensor([-1, 2]), ValueError, r"class labels 0 … 4, but got -1"),
        (["a cat", "a dog"], TypeError, r"class labels 0 … 4, integers of shape \(B,\), but got list"),
        (torch.rand(2), TypeError, r"but got torch.float32 \(2,\)"),
        (None, TypeError, r"but got NoneType\. Batches are \(image, label, index\)"),
    ],
)
def test_bad_labels_of_a_batch(labels, error, message):
    with pytest.raises(error, match=message):
        tiny_diffusion(unet={"num_class_embeds": 5}).training_step((torch.rand(2, 1, 8, 8), labels))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_image_i_gets_its_class_whatever_the_batches():
    module = tiny_diffusion(unet={"num_class_embeds": 3})
    together = module.sample(5, num_inference_steps=2)
    given = module.sample(5, num_inference_steps=2, batch_size=2, labels=torch.tensor([0, 1, 2, 0, 1]))
    torch.testing.assert_close(together, given)
    torch.testing.assert_close(together[3:], module.sample(2, start=3, num_inference_steps=2))
    assert not torch.allclose(together[1:2], module.sample(1, start=1, num_inference_steps=2, labels=2))


def test_guidance_equals_two_calls():
    module = tiny_diffusion(unet={"num_class_embeds": 4}, label_dropout=0.1, guidance_scale=3.0).eval()
    images, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    with torch.no_grad():
        free, told = (module(images, t, which, use_ema=True) for which in (torch.full((2,), 3), labels))
        add_null, averaged = module.conditioning.add_null, partial(module, use_ema=True)
        both = guided(averaged, images, t.expand(2), labels, add_null=add_null, scale=3.0)
    torch.testing.assert_close(both, free + 3 * (told - free), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(images, t), module(images, t, torch.full((2,), 3)))
    settings = {"num_inference_steps": 2, "labels": 1}
    assert torch.equal(module.sample(1, **settings), module.sample(1, guidance_scale=3.0, **settings))
    assert not torch.allclose(module.sample(1, **settings), module.sample(1, guidance_scale=1.0, **settings))


@pytest.mark.parametrize(
    ("unet", "kwargs", "message"),
    [
        ({"num_class_embeds": 3}, {"labels": [0, 1]}, r"one for each of 3 images, but got 2"),
        ({"num_class_embeds": 3}, {"labels": [0, 1, 3]}, r"class labels 0 … 2, but got 3"),
        ({"num_class_embeds": 3}, {"guidance_scale": 2.0}, r"`guidance_scale` expected 1 .* but got 2"),
        ({}, {"labels": 1}, r"`labels` expected none for a denoiser without conditions, but got 1"),
        ({}, {"guidance_scale": 2.0}, r"`guidance_scale` expected 1 .* but got 2"),
    ],
)
def test_bad_labels_for_drawing(unet, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_diffusion(unet=unet).sample(3, num_inference_steps=2, **kwargs)


def test_labels_are_missing_where_they_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"`labels` expected a condition for each image, but got none"):
        Conditioning(None).labels_of_images(0, 3)
    assert Conditioning(None).labels_of_images(0, 2, torch.rand(2, 7)).shape == (2, 7)


def test_a_checkpoint_keeps_the_null_label(tmp_path):
    module = tiny_diffusion(unet={"num_class_embeds": 11}, label_dropout=0.2, guidance_scale=2.0)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=2)
    trainer.fit(module, DigitsDataModule(16, num_control=16, batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert (loaded.conditioning, loaded.label_dropout, loaded.guidance_scale) == (module.conditioning, 0.2, 2.0)
    assert torch.equal(loaded.sample(2, num_inference_steps=2), module.sample(2, num_inference_steps=2))


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
