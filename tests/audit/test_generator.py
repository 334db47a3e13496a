import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.generator import (
    Drawing,
    Generator,
    Probing,
    draw,
    load_checkpoint,
    load_pipeline,
    measure_losses,
)
from lightning_iet.audit.reading import image_set
from lightning_iet.data import ImageFolderDataModule
from lightning_iet.evaluation.membership import choose_images, infer_membership, noise_of, spread_timesteps
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.digit_models import digit_pixels, fresh_model, overfitted_model, save_checkpoint, save_pipeline
from tests.helpers.models import quiet_trainer, tiny_diffusion, tiny_unet


def drawn(generator, folder, **drawing):
    settings = {"num_samples": 5, "num_inference_steps": 3, "batch_size": 2}
    return draw(generator, Drawing(**settings | drawing), cache=BlockCache(folder)).pixels


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_checkpoint_draws_what_the_module_draws(tmp_path, use_ema):
    model = fresh_model()
    for parameter in model.ema.parameters():
        parameter.data *= 0.5
    save_checkpoint(model, tmp_path / "a.ckpt")
    found = drawn(load_checkpoint(tmp_path / "a.ckpt", use_ema=use_ema), tmp_path / "cache", seed=3)
    expected = model.sample(5, seed=3, num_inference_steps=3, use_ema=use_ema) * 255
    assert found.dtype == torch.uint8
    assert (found - expected).abs().max() < 0.51


@pytest.mark.parametrize(
    ("kind", "prediction_type"),
    [(DDPMPipeline, "epsilon"), (DDPMPipeline, "v_prediction"), (DDIMPipeline, "sample"), (DDIMPipeline, "epsilon")],
)
def test_a_pipeline_draws_what_diffusers_draws(tmp_path, kind, prediction_type):
    model = fresh_model(prediction_type=prediction_type, num_train_timesteps=20)
    save_pipeline(model, tmp_path / "pipeline", kind)
    generator = load_pipeline(tmp_path / "pipeline")
    module = generator.module
    assert module.scheduler.config.prediction_type == prediction_type
    found = drawn(generator, tmp_path / "cache", sampler="ddim", num_inference_steps=20, num_samples=2)

    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(20)
    noise = [torch.Generator().manual_seed(derive_seed(0, number)) for number in range(2)]
    images = torch.stack([torch.randn(1, 8, 8, generator=one) for one in noise])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            images = scheduler.step(model.unet(images, timestep).sample, timestep, images).prev_sample
    assert (found - (images / 2 + 0.5).clamp(0, 1) * 255).abs().max() < 0.6


def test_an_image_depends_on_its_number_alone(tmp_path):
    save_checkpoint(fresh_model(), tmp_path / "a.ckpt")
    generator = load_checkpoint(tmp_path / "a.ckpt")
    few, many = (
        drawn(generator, tmp_path / str(num), num_samples=num, batch_size=size) for num, size in ((3, 2), (7, 7))
    )
    assert (few.int() - many[:3].int()).abs().max() <= 1
    other = drawn(generator, tmp_path / "other", seed=1)
    assert (few.int() - other[:3].int()).abs().max() > 10


def test_more_images_are_added_to_those_that_are_there(tmp_path, monkeypatch):
    save_checkpoint(fresh_model(), tmp_path / "a.ckpt")
    generator, counts = load_checkpoint(tmp_path / "a.ckpt"), []
    sample = generator.module.sample
    monkeypatch.setattr(generator.module, "sample", lambda num, **kwargs: counts.append(num) or sample(num, **kwargs))
    few = drawn(generator, tmp_path / "cache", num_samples=4)
    many = drawn(generator, tmp_path / "cache", num_samples=7)
    assert counts == [2, 2, 2, 1]
    assert torch.equal(few, many[:4])


def test_the_hash_is_that_of_what_draws(tmp_path):
    def sha256(name, model, **options):
        save_checkpoint(model, tmp_path / f"{name}.ckpt")
        return load_checkpoint(tmp_path / f"{name}.ckpt", **options).sha256

    moved = fresh_model()
    next(moved.unet.parameters()).data += 1  # the last weights, which do not draw
    known = sha256("a", fresh_model())
    assert sha256("b", moved) == known
    others = [
        sha256("c", moved, use_ema=False),
        sha256("d", fresh_model(seed=1)),
        sha256("e", fresh_model(prediction_type="sample")),
    ]
    assert len({known, *others}) == 4
    save_pipeline(fresh_model(), tmp_path / "pipeline")
    first = load_pipeline(tmp_path / "pipeline").sha256
    shutil.move(tmp_path / "pipeline", tmp_path / "moved")
    assert load_pipeline(tmp_path / "moved").sha256 == first


def edited(folder, file="model_index.json", **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "which has no model_index.json"),
        (lambda folder: edited(folder, _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline is none of"),
        (lambda folder: edited(folder, scheduler=["diffusers", "KarrasVeScheduler"]), "KarrasVeScheduler has no"),
        (lambda folder: edited(folder, scheduler=["os", "system"]), "system has no noise schedule"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "line 1 column 2"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "pipeline"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "pipeline"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "pipeline"),
    ],
)
def test_other_folders_are_refused(tmp_path, damage, message):
    save_pipeline(fresh_model(), tmp_path / "pipeline")
    damage(tmp_path / "pipeline")
    with pytest.raises((ValueError, FileNotFoundError), match=r"^Argument `pipeline` expected") as error:
        load_pipeline(tmp_path / "pipeline")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("unet", "message"),
    [({"num_class_embeds": 10}, "a class that is given"), ({"out_channels": 2}, "it predicts 2 channels")],
)
def test_networks_of_another_kind_are_refused(tmp_path, unet, message):
    save_pipeline(SimpleNamespace(unet=tiny_unet(**unet), scheduler=DDPMScheduler()), tmp_path / "pipeline")
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / "pipeline")


def test_a_module_of_another_class_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_iet.audit.generator.load_any_module", lambda path, **_: "text")
    save_checkpoint(fresh_model(), tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint of a DiffusionModule, but got .* one of a str\. Draw its images"):
        load_checkpoint(tmp_path / "plain.ckpt")


@pytest.mark.parametrize("deep", [False, True])
def test_the_range_of_training_is_in_the_checkpoint(tmp_path, deep):
    """So that an audit of the model reads images of more than 8 bits as they were trained on."""
    (tmp_path / "images").mkdir()
    images = np.random.default_rng(0).integers(
        0, 4096 if deep else 256, (8, 8, 8), dtype=np.uint16 if deep else np.uint8
    )
    images[0, 0, 0] = 4095 if deep else 255
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    data = ImageFolderDataModule(tmp_path / "images", num_control=2, num_reference=2, channels=1, batch_size=2)
    trainer = quiet_trainer(tmp_path, max_epochs=0)
    trainer.fit(tiny_diffusion(), data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    generator = load_checkpoint(tmp_path / "model.ckpt")
    assert generator.value_range == ((0, 4095) if deep else "auto")
    assert generator.fit == "crop"


# --- losses -----------------------------------------------------------------------------------------------------------


def losses(model, pixels, folder, **probing):
    settings = {"timesteps": 5, "batch_size": 7}
    return measure_losses(
        Generator(model, "model", "hash", use_ema=True),
        image_set(pixels, location="images"),
        Probing(**settings | probing),
        cache=BlockCache(folder),
        argument="train",
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_losses_equal_those_of_the_images_one_by_one(tmp_path, prediction_type):
    model, pixels = fresh_model(prediction_type=prediction_type), digit_pixels(0, 10)
    found = losses(model, pixels, tmp_path)
    assert found.shape == (10, 5)
    with torch.no_grad():
        for index, image in enumerate(pixels):
            for number, timestep in enumerate((10, 30, 50, 70, 90)):
                noise = noise_of(index, number, image.shape, seed=0)[None]
                expected = model.losses(image[None] / 255, torch.tensor([timestep]), noise, use_ema=True)
                torch.testing.assert_close(found[index, number], expected[0], rtol=1e-4, atol=1e-6)


def test_noise_is_that_of_the_position_and_the_draw(tmp_path):
    first, again = (noise_of(3, 1, torch.Size([1, 2, 2]), seed=0) for _ in range(2))
    assert torch.equal(first, again)
    for index, number, seed in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
        assert not torch.equal(first, noise_of(index, number, first.shape, seed=seed))
    model, pixels = fresh_model(), digit_pixels(0, 10)
    whole, part = losses(model, pixels, tmp_path / "a"), losses(model, pixels[:4], tmp_path / "b")
    torch.testing.assert_close(whole[:4], part)


def test_some_of_the_images_keep_their_noise(tmp_path):
    model, pixels = fresh_model(), digit_pixels(0, 20)
    places = choose_images(20, 6)
    assert len(places.unique()) == 6
    torch.testing.assert_close(
        losses(model, pixels, tmp_path, images=6), losses(model, pixels, tmp_path / "all")[places]
    )


def test_finished_blocks_are_not_measured_again(tmp_path, monkeypatch):
    model, pixels = fresh_model(), digit_pixels(0, 20)
    whole = losses(model, pixels, tmp_path)
    monkeypatch.setattr(model, "losses", None)
    assert torch.equal(losses(model, pixels, tmp_path), whole)
    with pytest.raises(TypeError):
        losses(model, pixels, tmp_path, seed=1)


@given(st.integers(1, 200), st.integers(1, 1000))
def test_timesteps_are_the_middles_of_equal_parts(count, total):
    found = spread_timesteps(count, total).tolist()
    assert len(found) == min(count, total)
    assert found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < total
    part = total / len(found)
    assert all(-1e-9 < (index + 0.5) * part - step < 1 for index, step in enumerate(found))


def test_a_model_that_has_memorized_is_told_from_a_fresh_one(tmp_path):
    train, held_out = digit_pixels(0, 6), digit_pixels(100, 200)
    more = digit_pixels(0, 100)
    found = [
        infer_membership(
            losses(model, images, tmp_path / name / "train", timesteps=10, batch_size=256),
            losses(model, held_out, tmp_path / name / "held_out", timesteps=10, batch_size=256),
            spread_timesteps(10, 100),
        )
        for name, model, images in (("fresh", fresh_model(), more), ("overfitted", overfitted_model(train), train))
    ]
    assert found[0].auc_low < 0.5 < found[0].auc_high
    assert abs(found[0].auc - 0.5) < 0.1
    assert found[1].auc > 0.9
    assert found[1].auc_low > 0.8
    early = found[1].timesteps[0]
    assert 0 < early.low < early.gap < early.high
