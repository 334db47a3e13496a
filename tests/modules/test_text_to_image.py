"""Fine-tuning of text-to-image pipelines: the loss, what is trained, what is shared, and what is saved."""

import gc

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data.duplicates import OncePerGroup
from lightning_iet.modules import TextToImageModule
from lightning_iet.modules.pipelines import load_pipeline
from lightning_iet.shards.ema import unregistered_averages
from tests.helpers.models import quiet_trainer
from tests.helpers.text_to_image import CaptionedData, make_module, save_pipelines

KINDS = ["sd1", "sd2", "sdxl"]
WAYS = {"full": {}, "lora": {"lora_rank": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pipelines(tmp_path_factory.mktemp("pipelines"))


def batch(num=3):
    return [torch.rand(num, 3, 16, 16), [f"caption {i}, and more" for i in range(num)], torch.arange(num)]


def fit(tmp_path, module, *, shards=2, callbacks=(), data=None, ckpt=None, **kwargs):
    """Train on two shards, averaged after every epoch; return the trainer."""
    data = ShardedDataModule(data or CaptionedData(), num_shards=shards)
    averaging = ParameterAveragingCallback(num_shards=shards)
    trainer = quiet_trainer(
        tmp_path, callbacks=[averaging, *callbacks], **{"max_epochs": 1, "limit_val_batches": 0} | kwargs
    )
    torch.manual_seed(7)
    trainer.fit(module, data, ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
    return trainer


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_equals_a_reference_in_the_style_of_diffusers(folders, kind):
    module = make_module(folders[kind], caption_dropout=0.0)
    module.log = lambda *args, **kwargs: None
    images, captions, _ = samples = batch()
    torch.manual_seed(3)
    step = module.training_step(samples)

    pipe = load_pipeline(folders[kind])
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(3)
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.sample() * pipe.vae.config.scaling_factor
    t = torch.randint(1000, (3,))
    noise = torch.randn(latents.shape)
    noisy = noise_scheduler.add_noise(latents, noise, t)
    told = pipe.encode_prompt(prompt=captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {"text_embeds": told[2], "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 3)} if kind == "sdxl" else None
    target = noise_scheduler.get_velocity(latents, noise, t) if kind == "sd2" else noise
    prediction = pipe.unet(noisy, t, told[0], added_cond_kwargs=added).sample
    expected = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))

    assert torch.equal(step["timesteps"], t)
    torch.testing.assert_close(step["sample_loss"], expected)
    torch.testing.assert_close(step["loss"], expected.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_is_left_out_is_what_guidance_takes_for_none(folders, kind):
    module, pipe = make_module(folders[kind]), load_pipeline(folders[kind])
    told = pipe.encode_prompt(prompt="x", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(module.captions.null().hidden, told[1])
    if kind == "sdxl":
        assert not told[1].any()
        torch.testing.assert_close(module.captions.null().pooled, told[3])


def test_captions_are_left_out_at_their_rate(folders):
    module = make_module(folders["sd1"], caption_dropout=0.25)
    module.log = lambda *args, **kwargs: None
    seen = []
    module.losses = lambda latents, t, noise, told: (seen.append(told.hidden), latents.mean(dim=(1, 2, 3)))[1]
    module.training_step(batch(150))
    null = module.captions.null().hidden
    dropped = torch.tensor([torch.equal(row, null[0]) for hidden in seen for row in hidden])
    assert 0.15 < dropped.float().mean() < 0.35


def test_held_out_losses_compare_between_epochs(folders, tmp_path):
    module = make_module(folders["sd1"])
    trainer = quiet_trainer(tmp_path)
    first = trainer.validate(module, CaptionedData(), verbose=False)
    assert trainer.validate(module, CaptionedData(), verbose=False) == first


def test_saving_memory_changes_no_gradient(folders):
    gradients = []
    for checkpointing in (False, True):
        module = make_module(folders["sdxl"], gradient_checkpointing=checkpointing)
        module.log = lambda *args, **kwargs: None
        torch.manual_seed(5)
        module.training_step(batch())["loss"].backward()
        gradients.append([p.grad for p in module.unet.parameters()])
    torch.testing.assert_close(*gradients)


def test_encoders_keep_their_precision_under_autocast(folders):
    module = make_module(folders["sd1"])
    images, captions, _ = batch()
    expected = module.latents(images, at_mean=True), module.captions(captions).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.latents(images, at_mean=True), module.captions(captions).hidden
        losses = module.losses(found[0], torch.tensor([1, 2, 3]), torch.randn(3, 4, 8, 8), module.captions(captions))
    assert losses.dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# --- shards ----------------------------------------------------------------------------------------------------------


class Recorded(ParameterAveragingCallback):
    """Keeps what each shard was before the first averaging."""

    def _average(self, engine):
        engine.park()
        views = [engine.layout.views(state.flat) for state in engine.states.values()]
        self.before = [{name: tensor.clone() for name, tensor in view.items()} for view in views]
        super()._average(engine)


class Pointers(pl.Callback):
    """Where each frozen tensor lies while each batch is trained."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.add(
            tuple(p.data_ptr() for name, p in pl_module.named_parameters() if name in pl_module._frozen_names)
        )

    def on_train_epoch_end(self, trainer, pl_module):
        gc.collect()
        weight = pl_module.latents.vae.encoder.conv_in.weight
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        alike = [t for t in tensors if (t.shape, t.dtype) == (weight.shape, weight.dtype) and torch.equal(t, weight)]
        self.copies = len({t.data_ptr() for t in alike})


@pytest.mark.parametrize(("kind", "way"), [("sd1", "full"), ("sdxl", "lora")])
def test_two_shards_change_and_average_what_is_trained_alone(folders, tmp_path, kind, way):
    module = make_module(folders[kind], **WAYS[way])
    start = {name: p.detach().double() for name, p in module.named_parameters()}  # no copies of their own kind
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert all(name.startswith("unet.") and ("lora_" in name) == (way == "lora") for name in trained)
    averaging, pointers = Recorded(num_shards=2), Pointers()
    trainer = quiet_trainer(tmp_path, callbacks=[averaging, pointers], max_epochs=1)
    trainer.fit(module, ShardedDataModule(CaptionedData(6), num_shards=2))

    end = dict(module.named_parameters())
    shards = averaging.before
    assert set(shards[0]) == set(trained) | {f"ema.module.{i}" for i in range(len(trained))}
    for name in shards[0]:
        assert not torch.equal(shards[0][name], shards[1][name]), name
        torch.testing.assert_close(end[name].detach(), (shards[0][name] + shards[1][name]) / 2)
    for name in set(start) - set(shards[0]):
        assert torch.equal(end[name].double(), start[name]), name
    assert len(pointers.seen) == 1
    assert pointers.copies == 1


def test_nothing_of_the_module_is_taken_for_another_average(folders):
    module = make_module(folders["sdxl"], lora_rank=2, cache_latents="memory", cache_text="memory")
    module.sample(2, num_inference_steps=1, prompts=["a", "b"])
    assert unregistered_averages(module) == ([], [])


@pytest.mark.parametrize("way", WAYS)
def test_the_average_of_the_weights_follows_every_step(folders, tmp_path, way):
    module = make_module(folders["sd1"], **WAYS[way])
    start = {name: p.detach().clone() for name, p in module.unet.named_parameters() if p.requires_grad}
    assert len(list(module.ema.module.parameters())) == len(start)
    quiet_trainer(tmp_path, max_steps=1).fit(module, CaptionedData())
    for name, averaged in module.ema.weights().items():
        torch.testing.assert_close(averaged, (start[name] + module.unet.get_parameter(name).detach()) / 2)
    latents, t, told = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), module.captions(["a", "b"])
    with torch.no_grad():
        averaged, plain = (module(latents, t, told, use_ema=use_ema) for use_ema in (True, False))
        assert not torch.equal(averaged, plain)
        module.unet.load_state_dict(module.ema.weights(), strict=False)
        assert torch.equal(averaged, module(latents, t, told))


def test_anti_gradient_control_leaves_out_what_a_loop_does(folders, tmp_path):
    module = make_module(folders["sd1"], optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2))
    # So much noise that it is learnt, and falls below what is usual, within a few steps.
    module.scheduler = DDPMScheduler(num_train_timesteps=2, beta_start=0.9, beta_end=0.99)
    steps = []
    own = module.training_step

    def recorded(*args):
        steps.append(own(*args))
        return steps[-1]

    module.training_step = recorded
    agc = AntiGradientControl(threshold=0.8, num_timesteps=2)
    quiet_trainer(tmp_path, callbacks=[agc], max_epochs=8).fit(module, CaptionedData(batch_size=4))
    bank, skipped = [0.0, 0.0], 0
    for step in steps:
        losses, times = step["sample_loss"].tolist(), step["timesteps"].tolist()
        kept = [loss for loss, t in zip(losses, times, strict=True) if loss >= 0.8 * bank[t]]
        for loss, t in zip(losses, times, strict=True):
            bank[t] = 0.8 * bank[t] + 0.2 * loss
        assert step["loss"].item() == pytest.approx(sum(kept) / max(1, len(kept)), rel=1e-4)
        skipped += len(losses) - len(kept)
    assert skipped > 3
    assert agc.skip_rate() == pytest.approx(skipped / 64)


# --- caches ----------------------------------------------------------------------------------------------------------


class Losses(pl.Callback):
    """The losses of every sample."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.all.append(outputs["sample_loss"].detach())


# In memory, in files, and in files that are there already.
@pytest.mark.parametrize(
    ("kind", "flips", "places", "shards"),
    [("sd1", False, ("none", "memory", "cache"), 2), ("sdxl", True, ("none", "cache", "cache/"), 1)],
)
def test_caches_give_the_same_losses(folders, tmp_path, monkeypatch, kind, flips, places, shards):
    monkeypatch.chdir(tmp_path)
    losses, encoded = {}, {}
    for place in places:
        module = make_module(folders[kind], lora_rank=2, cache_latents=place, cache_text=place)
        counts = encoded[place] = {"images": 0, "captions": 0}
        count = lambda what, num, counts=counts: counts.update({what: counts[what] + num})  # noqa: E731
        encode = module.latents.vae.encode
        module.latents.vae.encode = lambda x, encode=encode, count=count: (count("images", len(x)), encode(x))[1]
        module.captions.encoders[0].register_forward_pre_hook(
            lambda net, args, count=count: count("captions", len(args[0]))
        )
        recorded = Losses()
        fit(
            tmp_path,
            module,
            shards=shards,
            callbacks=[recorded],
            data=CaptionedData(4, flips=flips),
            max_epochs=2,
            limit_val_batches=1,
        )
        losses[place] = torch.stack(recorded.all)
    none, first, second = places
    for place in (first, second):
        torch.testing.assert_close(losses[place], losses[none])
    null, held_out = 1, 6  # two in each validation, of which the first comes before training
    assert encoded[none] == {"images": 8 + held_out, "captions": 8 + held_out + null}
    # Held-out captions are looked up, not kept, and here are those of training images.
    assert encoded[first]["captions"] <= 4 + 2 + null
    if flips:
        assert encoded[second] == {"images": held_out, "captions": null}
    else:
        assert encoded[first] == encoded[second]
        assert encoded[first]["images"] == 4 + held_out


def test_a_step_in_evaluation_mode_keeps_nothing(folders):
    module = make_module(folders["sd1"], cache_latents="memory", cache_text="memory")
    module.log = lambda *args, **kwargs: None
    module.training_step(module.on_before_batch_transfer(batch(), 0))
    written = [cache.num_written for cache in (module.latents.cache, module.captions.cache)]
    assert written == [3, 3]
    module.eval().training_step(module.on_before_batch_transfer(batch(4), 0))
    assert [cache.num_written for cache in (module.latents.cache, module.captions.cache)] == written


def test_a_cache_on_disk_serves_its_own_autoencoder_only(folders, tmp_path):
    images = torch.rand(2, 3, 16, 16)
    first = make_module(folders["sd1"], cache_latents=str(tmp_path))
    first.latents(first.latents.look_up(images))
    assert isinstance(first.latents.look_up(images), tuple)
    assert hasattr(first.latents.look_up(images), "moments")
    for changed in (images.flip(-1), images[..., :8], images.double()):
        assert hasattr(first.latents.look_up(changed), "keys")
    other = make_module(folders["sd1"], cache_latents=str(tmp_path))
    assert hasattr(other.latents.look_up(images), "moments")
    other = make_module(folders["sd1"], cache_latents=str(tmp_path))
    other.latents.vae.encoder.conv_in.bias.data += 1
    assert hasattr(other.latents.look_up(images), "keys")


def test_images_that_never_repeat_are_not_cached(folders, tmp_path):
    module = make_module(folders["sd1"], lora_rank=2, cache_latents="memory")
    with pytest.raises(ValueError, match=r"`cache_latents` expected images that are always the same.* got 18 .* of 8"):
        fit(tmp_path, module, data=CaptionedData(noise=True), max_epochs=4)


def test_all_images_of_a_group_that_counts_as_one_are_cached(folders, tmp_path):
    class Balanced(CaptionedData):
        def setup(self, stage):
            super().setup(stage)
            self.train_set = OncePerGroup(self.train_set, torch.tensor([0, 0, 0, 0, 0, 0, 0, 1]))

    module = make_module(folders["sd1"], lora_rank=2, cache_latents="memory")
    fit(tmp_path, module, data=Balanced(), shards=1, max_epochs=20)
    assert 5 <= module.latents.cache.num_written <= 8  # of two groups, which may have an image and its mirror image


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_flips_of_some_images_of_a_batch_are_cached_once(folders, tmp_path, place):
    module = make_module(folders["sd1"], cache_latents=str(tmp_path / "cache") if place == "disk" else place)
    module.log = lambda *args, **kwargs: None
    images, captions, index = batch(4)
    written = []
    for number in (0, 1, 2, 3, 4, 0, 1):  # which image is mirrored; 4: none
        flipped = images.clone()
        flipped[number : number + 1] = images[number : number + 1].flip(-1)
        module.training_step(module.on_before_batch_transfer([flipped, captions, index], 0))
        written.append(module.latents.cache.num_written)
    assert written == [4, 6, 7, 8, 8, 8, 8]


@pytest.mark.parametrize("first", ["labels", "index"])
def test_labels_beside_the_index_do_not_count_as_samples(folders, first):
    module = make_module(folders["sd1"], cache_latents="memory")
    module.log = lambda *args, **kwargs: None
    labels = torch.tensor([0, 1, 0, 1])
    for start in (0, 4, 8):
        images, captions, index = batch(4)
        others = [labels, index + start] if first == "labels" else [index + start, labels]
        module.training_step(module.on_before_batch_transfer([images, captions, *others], 0))
    assert module.latents.cache.num_written == 12


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Save(pl.Callback):
    """Saves at one step."""

    def __init__(self, place, epoch, batch_idx):
        self.place, self.at = place, (epoch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.place)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_cut_off_ends_in_the_same_bits(folders, tmp_path, way):
    whole, resumed = (make_module(folders["sd2"], seed=seed, **WAYS[way]) for seed in (0, 1))
    # In the middle of an epoch, where one shard has taken more steps than the other.
    save, settings = Save(tmp_path / "cut.ckpt", epoch=1, batch_idx=0), {"data": CaptionedData(4), "max_epochs": 2}
    fit(tmp_path, whole, callbacks=[save, AntiGradientControl(threshold=0.8)], **settings)
    agc = AntiGradientControl(threshold=0.8)
    fit(tmp_path, resumed, callbacks=[agc], ckpt=tmp_path / "cut.ckpt", **settings)
    states = [dict(module.state_dict()) for module in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_a_checkpoint_of_adapters_is_small_and_names_its_pipeline(folders, tmp_path):
    module = make_module(folders["sd1"], lora_rank=2, sample_prompts=["a dog"])
    trainer = fit(tmp_path, module, shards=1, data=CaptionedData(2, batch_size=1))
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert all("lora_" in name or name.startswith("ema.") for name in saved["state_dict"])
    bytes_of = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert bytes_of(saved["state_dict"].values()) < bytes_of(module.parameters()) / 10
    assert saved["specification"]["pretrained"] == str(folders["sd1"])

    moved = tmp_path / "moved"
    load_pipeline(folders["sd1"]).save_pretrained(moved)
    for loaded in (
        TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt"),
        TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt", pretrained=moved),
    ):
        assert loaded.sample_prompts == ["a dog"]
        parameters = dict(loaded.named_parameters())
        for name, p in module.named_parameters():
            assert torch.equal(parameters[name], p), name
    with pytest.raises(ValueError, match=r"expected the frozen weights of .*sd1', .*, of .*sdxl'\. Give the same"):
        TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt", pretrained=folders["sdxl"])
    with pytest.raises(ValueError, match="expected `lora_rank` 2, but got 3"):
        TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt", lora_rank=3)


def test_a_synthetic_model_says_so_and_comes_back_from_its_checkpoint(tmp_path, caplog):
    module = TextToImageModule("some/model", synthetic=True, image_size=16, lora_rank=1)
    assert "SYNTHETIC MODEL: tiny random weights in the place of some/model" in caplog.text
    trainer = fit(tmp_path, module, shards=1, data=CaptionedData(2, batch_size=1))
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    loaded = TextToImageModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loaded.unet.conv_in.weight, module.unet.conv_in.weight)


def test_weights_of_another_module_are_refused(folders, tmp_path):
    torch.save({"specification": {"module": "DiffusionModule"}, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"expected a checkpoint of a TextToImageModule, but .* of DiffusionModule"):
        TextToImageModule.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"another architecture, but got \d+ of \d+ weights that differ: 'unet\."):
        make_module(folders["sd1"]).load_state_dict(make_module(folders["sdxl"]).state_dict())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lora_rank": 0}, "`lora_rank` expected an integer ≥ 1, but got 0"),
        ({"warmup_steps": -1}, "`warmup_steps` expected an integer ≥ 0, but got -1"),
        ({"ema_decay": 1.0}, r"`ema_decay` expected a number in \[0, 1\), but got 1.0"),
        ({"caption_dropout": -0.1}, r"`caption_dropout` expected a number in \[0, 1\), but got -0.1"),
        ({"image_size": 15}, "`image_size` expected multiples of 2, .* but got 15 × 15"),
        ({"lora_rank": 2, "lora_targets": ["to_x"]}, r"`lora_targets` expected .* but got \['to_x'\]"),
    ],
)
def test_bad_arguments(folders, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        make_module(folders["sd1"], **kwargs)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.rand(2, 3, 16, 16), torch.tensor([1, 2])], "expected a list of captions .* but got a Tensor"),
        ([torch.rand(2, 3, 16, 16)], "expected a list of captions .* but got nothing"),
        ([torch.rand(2, 1, 16, 16), ["a", "b"]], r"expected images of shape \(B, 3, H, W\), but got \(2, 1, 16, 16\)"),
        ([torch.rand(2, 3, 16, 15), ["a", "b"]], "expected height and width in multiples of 2, .* got 16 × 15"),
    ],
)
def test_bad_batches(folders, samples, message):
    with pytest.raises(ValueError, match=message):
        make_module(folders["sd1"]).training_step(samples)
