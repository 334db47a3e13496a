"""Images of fine-tuned pipelines: the same as those of diffusers, before and after export."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from lightning_iet.data.duplicates import OncePerGroup
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules import TextToImageModule
from lightning_iet.modules.noise_processes import sample_images
from lightning_iet.modules.pipelines import load_pipeline
from tests.helpers.models import quiet_trainer
from tests.helpers.text_to_image import CaptionedData, make_module, save_pipelines

CLASSES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a dog", "two cats and a bird"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pipelines(tmp_path_factory.mktemp("pipelines"))


def draw_with(pipeline, numbers, *, seed, guidance=7.5, steps=3):
    """What a user of diffusers would write."""
    generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
    prompts = [PROMPTS[number % 2] for number in numbers]
    return torch.cat(
        [
            pipeline(
                prompt, generator=generator, guidance_scale=guidance, num_inference_steps=steps, output_type="pt"
            ).images
            for prompt, generator in zip(prompts, generators, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("kind", "sampler", "guidance"),
    [("sd2", "ddim", 7.5), ("sdxl", "ddim", 7.5), ("sd1", "ddpm", 1.0)],
)
def test_images_equal_those_of_the_pipeline(folders, kind, sampler, guidance):
    module, pipeline = make_module(folders[kind]), load_pipeline(folders[kind])
    pipeline.scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler].from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    ours = module.sample(
        3,
        seed=5,
        start=2,
        batch_size=2,
        sampler=sampler,
        num_inference_steps=3,
        prompts=PROMPTS,
        guidance_scale=guidance,
    )
    torch.testing.assert_close(ours, draw_with(pipeline, [2, 3, 4], seed=5, guidance=guidance), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "rank"), [("sd2", None), ("sdxl", 2)])
def test_train_export_load_draws_the_same_images(folders, tmp_path, kind, rank):
    module = make_module(folders[kind], lora_rank=rank)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, CaptionedData(4))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt")
    untrained = make_module(folders[kind]).sample(2, num_inference_steps=3, prompts=PROMPTS)
    for use_ema in (True, False) if rank else (True,):
        images = loaded.sample(2, seed=1, num_inference_steps=3, prompts=PROMPTS, use_ema=use_ema)
        assert not torch.equal(images, untrained)
        loaded.pipeline(use_ema=use_ema).save_pretrained(tmp_path / f"export{use_ema}")
        exported = CLASSES[kind].from_pretrained(tmp_path / f"export{use_ema}")
        torch.testing.assert_close(draw_with(exported, [0, 1], seed=1), images, rtol=0, atol=1e-4)
    # The module is as it was, and what was exported can be fine-tuned.
    assert torch.equal(loaded.sample(2, seed=1, num_inference_steps=3, prompts=PROMPTS, use_ema=use_ema), images)
    again = make_module(tmp_path / f"export{use_ema}")
    torch.testing.assert_close(
        again.sample(2, seed=1, num_inference_steps=3, prompts=PROMPTS), images, rtol=0, atol=1e-4
    )


def test_an_export_without_training_has_the_same_weights(folders):
    pipeline = load_pipeline(folders["sdxl"])
    exported = make_module(folders["sdxl"], lora_rank=2).pipeline()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(pipeline, part).state_dict()
        found = getattr(exported, part).state_dict()
        assert weights.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_images_of_another_size_than_the_pipeline_draws(folders, tmp_path):
    module = make_module(folders["sd1"], image_size=(16, 24))
    images = module.sample(1, num_inference_steps=2, prompts=PROMPTS)
    assert images.shape == (1, 3, 16, 24)
    module.pipeline().save_pretrained(tmp_path / "wide")
    wide = StableDiffusionPipeline.from_pretrained(tmp_path / "wide")
    torch.testing.assert_close(draw_with(wide, [0], seed=0, steps=2), images, rtol=0, atol=1e-4)


def test_drawing_disturbs_neither_modes_nor_random_stream(folders):
    module = make_module(folders["sd1"])
    state = torch.get_rng_state()
    done = []
    module.sample(3, batch_size=2, sampler="ddpm", num_inference_steps=1, progress=done.append)
    assert done == [2, 1]
    assert torch.equal(torch.get_rng_state(), state)
    assert module.unet.training
    assert not module.latents.vae.training
    assert not module.captions.encoders[0].training


def test_prompts_of_the_training_set_are_drawn_while_training(folders, tmp_path):
    module = make_module(folders["sd1"], lora_rank=2, sample_prompts="train")
    with pytest.raises(ValueError, match=r"`sample_prompts` is 'train'.* Give captions"):
        module.sample(1)
    seen = []
    own = module.captions.forward
    module.captions.forward = lambda captions, **options: (seen.append(list(captions)), own(captions, **options))[1]

    class Draw(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.sample(3, start=7, num_inference_steps=1)

    quiet_trainer(tmp_path, callbacks=[Draw()], max_steps=1).fit(module, CaptionedData(8))
    assert seen[-1] == [f"a picture of thing {number}" for number in (7, 0, 1)]


def test_one_caption_is_a_caption(folders):
    module = make_module(folders["sd1"], sample_prompts="a red car")
    expected = module.sample(2, prompts=["a red car"], num_inference_steps=1)
    assert torch.equal(module.sample(2, num_inference_steps=1), expected)
    assert torch.equal(module.sample(2, prompts="a red car", num_inference_steps=1), expected)


def test_captions_of_the_training_set_are_of_all_near_duplicates(folders, tmp_path):
    module = make_module(folders["sd1"], lora_rank=2, sample_prompts="train")
    samples = [(torch.zeros(3, 8, 8), f"caption {number}", number) for number in range(4)]
    module._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(train_set=OncePerGroup(samples, torch.tensor([0, 0, 0, 1])))
    )
    found = module._prompts(None)
    assert [found(number) for number in range(5)] == [f"caption {number}" for number in (0, 1, 2, 3, 0)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_as_many_steps_as_in_training(folders, sampler):
    config = dict(load_pipeline(folders["sd1"]).scheduler.config) | {"num_train_timesteps": 12, "clip_sample": False}
    assert config["steps_offset"] == 1  # with which they would be 12 … 1
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler].from_config(config)
    calls = []

    def denoise(images, timesteps, conditions):
        calls.append(int(timesteps[0]))
        return 0.1 * images

    images = sample_images(denoise, scheduler, (1, 4, 4), 1, module=torch.nn.Linear(1, 1), num_inference_steps=12)
    assert calls == list(reversed(range(12)))
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num": 0}, "`num` expected an integer ≥ 1, but got 0"),
        ({"num": 1, "num_inference_steps": 1001}, "`num_inference_steps` expected at most 1000, but got 1001"),
        ({"num": 1, "prompts": []}, "`prompts` expected at least one caption, but got none"),
    ],
)
def test_bad_numbers(folders, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_module(folders["sd1"]).sample(**kwargs)
