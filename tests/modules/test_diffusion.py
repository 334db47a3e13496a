import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from lightning_iet import DiffusionModule, DigitsDataModule
from lightning_iet.functional.diffusion import prediction_target
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.models import quiet_trainer, tiny_diffusion, tiny_unet


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_losses_equal_a_ten_line_reference(prediction_type):
    module = tiny_diffusion(scheduler=DDPMScheduler(prediction_type=prediction_type))
    images, noise, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    betas = torch.linspace(1e-4, 0.02, 1000)
    for i in range(4):
        alpha = torch.prod(1 - betas[: t[i] + 1])
        x = images[i] * 2 - 1
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise[i]
        velocity = alpha.sqrt() * noise[i] - (1 - alpha).sqrt() * x
        target = {"epsilon": noise[i], "sample": x, "v_prediction": velocity}[prediction_type]
        expected = ((module.unet(noisy[None], t[i]).sample[0] - target) ** 2).mean()
        torch.testing.assert_close(module.losses(images, t, noise)[i], expected, rtol=1e-4, atol=1e-5)


def test_velocity_agrees_with_diffusers():
    scheduler = DDPMScheduler()
    images, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    ours = prediction_target(images, noise, t, scheduler.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(ours, scheduler.get_velocity(images, noise, t))


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"`prediction_type` expected 'epsilon', .* but got 'x'"):
        prediction_target(*[torch.zeros(1)] * 4, "x")


def test_training_step_returns_the_protocol(tmp_path):
    seen = []

    class Module(DiffusionModule):
        def training_step(self, batch, batch_idx):
            seen.append(super().training_step(batch, batch_idx))
            return seen[-1]

    quiet_trainer(tmp_path, fast_dev_run=True).fit(Module(tiny_unet()), DigitsDataModule(16, batch_size=8))
    (output,) = seen
    assert output["sample_loss"].shape == output["timesteps"].shape == (8,)
    torch.testing.assert_close(output["loss"], output["sample_loss"].mean())


def test_the_moving_average_follows_every_optimizer_step(tmp_path):
    module = tiny_diffusion()
    expected = {name: p.detach().double() for name, p in module.unet.named_parameters()}

    class Module(DiffusionModule):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            for name, p in self.unet.named_parameters():
                expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double()

    module.__class__ = Module
    trainer = quiet_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, limit_val_batches=1)
    trainer.fit(module, DigitsDataModule(24, batch_size=4))
    assert module.ema.n_averaged.item() == 9  # 6 batches, accumulated in pairs, in 3 epochs
    for name, p in module.ema.module.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not p.requires_grad


def test_without_a_moving_average_the_weights_themselves_are_used():
    module = DiffusionModule(tiny_unet(), ema_decay=0)
    assert module.ema is None
    images = torch.rand(2, 1, 8, 8)
    t = torch.tensor([1, 2])
    torch.testing.assert_close(module(images, t, use_ema=True), module(images, t))


def test_warm_up_rises_linearly_from_the_first_step(tmp_path):
    rates = []

    class Module(DiffusionModule):
        def training_step(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    module = Module(tiny_unet(), warmup_steps=4, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, DigitsDataModule(24, batch_size=4))
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ema_decay": 1.0}, r"`ema_decay` expected a number in \[0, 1\), but got 1.0"),
        ({"warmup_steps": -1}, "`warmup_steps` expected an integer ≥ 0, but got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModule(tiny_unet(), **kwargs)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)])
def test_samples_equal_a_bare_loop_over_diffusers_scheduler(sampler, scheduler):
    module = tiny_diffusion().eval()
    ours = module.sample(1, seed=3, start=5, sampler=sampler, num_inference_steps=4)
    steps = scheduler()
    steps.set_timesteps(4)
    generator = torch.Generator().manual_seed(derive_seed(3, 5))
    images = torch.randn((1, 8, 8), generator=generator)[None]
    with torch.no_grad():
        for t in steps.timesteps:
            images = steps.step(module.ema(images, t).sample, t, images, generator=generator).prev_sample
    torch.testing.assert_close(ours, (images / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_depends_on_seed_and_number_alone(sampler):
    module = tiny_diffusion()
    together = module.sample(5, sampler=sampler, num_inference_steps=3)
    alone = module.sample(2, start=3, batch_size=1, sampler=sampler, num_inference_steps=3)
    torch.testing.assert_close(together[3:], alone)
    assert not torch.equal(together[:2], alone)
    assert not torch.equal(together, module.sample(5, seed=1, sampler=sampler, num_inference_steps=3))


def test_sampling_disturbs_neither_mode_nor_random_stream():
    module = tiny_diffusion().train()
    state = torch.get_rng_state()
    images = module.sample(2, sampler="ddpm", num_inference_steps=2)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (2, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num": 0}, "`num` expected an integer ≥ 1"),
        ({"num": 1, "batch_size": 0}, "`batch_size` expected an integer ≥ 1"),
        ({"num": 1, "num_inference_steps": 1001}, "`num_inference_steps` expected at most 1000, but got 1001"),
    ],
)
def test_bad_numbers(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_diffusion().sample(**kwargs)


class Plain(nn.Module):
    """Anybody's denoiser: f(x, t) -> tensor."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.net(x)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_that_are_not_finite_are_refused(sampler):
    module = tiny_diffusion()
    module.ema.module.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"finite images, but got NaN or infinity in 3 of 3.* earlier checkpoint"):
        module.sample(3, num_inference_steps=4, sampler=sampler)


def test_any_denoiser_is_trained_and_says_what_it_lacks_to_sample(tmp_path):
    module = DiffusionModule(Plain())
    quiet_trainer(tmp_path, fast_dev_run=True).fit(module, DigitsDataModule(16, batch_size=8))
    with pytest.raises(ValueError, match=r"config\.sample_size to sample from, but got Plain"):
        module.sample(1)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_rebuilds_the_module(tmp_path):
    module = tiny_diffusion(scheduler=DDPMScheduler(num_train_timesteps=100, prediction_type="sample"))
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.fit(module, DigitsDataModule(16, batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.ema_decay == 0.9
    assert loaded.num_timesteps == 100
    assert loaded.scheduler.config.prediction_type == "sample"
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_denoiser_without_a_config_must_be_given(tmp_path):
    module = DiffusionModule(Plain())
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.fit(module, DigitsDataModule(16, batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"Argument `unet` expected the denoiser .* Use load_from_checkpoint"):
        DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt", unet=Plain())
    assert torch.equal(loaded.unet.net.weight, module.unet.net.weight)


def test_a_checkpoint_cannot_name_classes_outside_diffusers(tmp_path):
    checkpoint = {"specification": {"unet": {"class_path": "os.system", "config": "true"}}, "state_dict": {}}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"expected a class of diffusers, but got 'os\.system'"):
        DiffusionModule.load_from_checkpoint(tmp_path / "evil.ckpt")
