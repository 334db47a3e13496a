"""Flow matching and EDM with our own modules, from training to the exported pipeline."""

import diffusers
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks import Evaluation
from lightning_iet.data import DigitsDataModule
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules import DiffusionModule, TextToImageModule
from lightning_iet.modules.pipelines import synthetic_pipeline
from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.tools.export import export
from tests.helpers.evaluations import FewDigits
from tests.helpers.models import quiet_trainer, tiny_diffusion, tiny_unet

SCHEDULERS = {"flow": FlowMatchEulerDiscreteScheduler(shift=2.0), "edm": EDMEulerScheduler()}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(not resumable|exists and is not empty).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*__array_(_|wrap).*:DeprecationWarning"),  # of diffusers with numpy 2
]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_training_evaluation_checkpoint_and_export(tmp_path, kind):
    flow_weighting, unet = "mode" if kind == "flow" else None, {"mid_block_type": None}
    module = tiny_diffusion(scheduler=SCHEDULERS[kind], flow_weighting=flow_weighting, unet=unet)
    agc = AntiGradientControl(0.9, num_bins=10)
    measures = ["membership_inference"]
    evaluation = Evaluation(num_samples=6, num_inference_steps=3, k=10, measures=measures, pictures=False)
    averaging = ParameterAveragingCallback(2, every_n_epochs=1)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[agc, evaluation, averaging],
        max_epochs=1,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    data = FewDigits(20, num_control=10, batch_size=5)
    trainer.fit(module, ShardedDataModule(data, 2, partition="iid"))
    assert agc.bins.continuous is False
    assert agc.bins.num_bins == 10
    assert evaluation.report is not None
    path = tmp_path / "some.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_any_module(path)
    assert type(loaded.scheduler) is type(SCHEDULERS[kind])
    assert dict(loaded.scheduler.config) == dict(module.scheduler.config)
    assert loaded.flow_weighting == module.flow_weighting
    images = loaded.sample(2, num_inference_steps=4, seed=7)
    assert images.equal(module.sample(2, num_inference_steps=4, seed=7))
    folder = export(path, out=tmp_path / "out")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is type(SCHEDULERS[kind])
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(derive_seed(7, number)) for number in range(2)]
    drawn = pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2), images, atol=1e-4, rtol=1e-4)
    again = DiffusionModule(pretrained=str(folder), ema_decay=0)  # and back
    torch.testing.assert_close(again.sample(2, num_inference_steps=4, seed=7), images)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_mask_is_that_of_bins_of_time(tmp_path, kind):
    """AGC's mask from the losses and timesteps of each step, computed naively."""
    module, seen = tiny_diffusion(scheduler=SCHEDULERS[kind]), []

    class Seen(AntiGradientControl):
        def select(self, sample_loss, timesteps):
            chosen = super().select(sample_loss, timesteps)
            seen.append((sample_loss.detach().tolist(), timesteps.tolist(), self.bins.locate(timesteps).tolist()))
            return chosen

    trainer = quiet_trainer(tmp_path, callbacks=[Seen(0.8, num_bins=4)], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, DigitsDataModule(32, batch_size=8))
    assert len(seen) == 4
    for losses, timesteps, bins in seen:
        assert all(loss > 0 for loss in losses)
        assert bins == [t * 4 // 1000 for t in timesteps]


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (FlowMatchEulerDiscreteScheduler(), lambda t: t + 1.0),
        (EDMEulerScheduler(prediction_type="v_prediction"), None),
        (EulerDiscreteScheduler(prediction_type="v_prediction", steps_offset=1), lambda t: t),
    ],
)
def test_text_to_image_pipelines_keep_their_kind(tmp_path, scheduler, told):
    pipeline = synthetic_pipeline("sd", image_size=16, vae_scale=2)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path / "pipeline")
    module = TextToImageModule(tmp_path / "pipeline", ema_decay=0)
    calls = []
    module.unet.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[1]))
    batch = [torch.rand(3, 3, 16, 16), ["a", "b", "c"]]
    latents, conditions = module.inputs(batch, training=False)
    timesteps = torch.tensor([0, 500, 999])
    losses = module.losses(latents, timesteps, torch.randn_like(latents), conditions)
    assert losses.shape == (3,)
    assert losses.isfinite().all()
    if told is not None:
        torch.testing.assert_close(calls[0], told(timesteps))
    own = module.sample(2, sampler="own", num_inference_steps=3, prompts=["a dog"])
    assert own.shape == (2, 3, 16, 16)
    exported = module.pipeline(sampler="own")
    assert type(exported.scheduler) is type(scheduler)


def test_weights_of_a_seed_are_those_of_plain_ddpm(tmp_path):
    """The path of DDPM is the one that it was: a loop in the test ends in the same bits."""
    module = DiffusionModule(tiny_unet(), ema_decay=0, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    mine = tiny_unet()
    mine.load_state_dict(module.unet.state_dict())
    images = torch.rand(8, 1, 8, 8)
    torch.manual_seed(3)
    module.log = lambda *_, **__: None
    module.training_step([images])["loss"].backward()
    torch.manual_seed(3)
    timesteps = torch.randint(1000, (8,))
    noise = torch.randn_like(images)
    noisy = diffusers.DDPMScheduler().add_noise(images * 2 - 1, noise, timesteps)
    (mine(noisy, timesteps).sample - noise).square().flatten(1).mean(1).mean().backward()
    for ours, plain in zip(module.unet.parameters(), mine.parameters(), strict=True):
        assert ours.grad.equal(plain.grad)
