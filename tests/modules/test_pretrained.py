import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import nn

from lightning_iet import DiffusionModule, DigitsDataModule
from lightning_iet.audit.generator import load_pipeline
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.pretrained import build, load_any_module, load_pretrained, which_weights
from tests.helpers.digit_models import drawn, save_checkpoint
from tests.helpers.models import quiet_trainer, tiny_diffusion, tiny_dit, tiny_unet


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published pipeline that predicts velocities."""
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    torch.manual_seed(1)
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet=tiny_unet(dropout=0.1), scheduler=scheduler).save_pretrained(folder)
    return folder


def same_weights(one, other):
    return all(torch.equal(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_pipeline_gives_weights_and_schedule(published):
    module = DiffusionModule(pretrained=str(published))
    theirs = DDPMPipeline.from_pretrained(published)
    assert same_weights(module.unet, theirs.unet)
    assert same_weights(module.ema.module, theirs.unet)
    assert module.scheduler.config.prediction_type == "v_prediction"
    assert module.num_timesteps == 50
    assert torch.equal(module.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)


def test_dropout_is_at_work_in_fine_tuning(published):
    """diffusers loads in evaluation mode, and Lightning trains in the mode that it finds."""
    assert all(part.training for part in DiffusionModule(pretrained=str(published)).modules())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_all_prediction_types(tmp_path, prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    DDIMPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(tmp_path)
    module = DiffusionModule(pretrained=str(tmp_path), ema_decay=0)
    assert isinstance(module.scheduler, DDIMScheduler)
    assert module.scheduler.config.prediction_type == prediction_type
    theirs = DDIMPipeline.from_pretrained(tmp_path)
    generators = [torch.Generator().manual_seed(derive_seed(0, i)) for i in range(2)]
    expected = theirs(batch_size=2, generator=generators, num_inference_steps=3, output_type="np").images
    torch.testing.assert_close(module.sample(2, num_inference_steps=3), torch.tensor(expected).permute(0, 3, 1, 2))


def test_parts_beside_the_index_as_in_the_first_published_models(published, tmp_path):
    for part in ("unet", "scheduler"):
        for file in (published / part).iterdir():
            shutil.copy(file, tmp_path)
    shutil.copy(published / "model_index.json", tmp_path)
    unet, scheduler = load_pretrained(str(tmp_path))
    assert same_weights(unet, DDPMPipeline.from_pretrained(published).unet)
    assert scheduler.config.num_train_timesteps == 50


def test_a_network_alone_and_a_schedule_of_ones_own(published):
    module = DiffusionModule(pretrained=str(published / "unet"))
    assert module.scheduler.config.prediction_type == "v_prediction"  # the schedule beside it
    own = DDPMScheduler(num_train_timesteps=20)
    assert DiffusionModule(pretrained=str(published), scheduler=own).num_timesteps == 20


def test_nothing_is_lost_when_nothing_is_trained(published, tmp_path):
    """Load, fine-tune by 0 steps, export, load."""
    module = DiffusionModule(pretrained=str(published))
    quiet_trainer(tmp_path, max_epochs=0).fit(module, DigitsDataModule(16, num_control=16, batch_size=8))
    for use_ema in (True, False):
        module.pipeline(use_ema=use_ema).save_pretrained(tmp_path / "exported")
        assert same_weights(UNet2DModel.from_pretrained(tmp_path / "exported", subfolder="unet"), module.unet)
        assert not [f for f in tmp_path.rglob("*.json") if str(published) in f.read_text()]
    assert same_weights(module.unet, DDPMPipeline.from_pretrained(published).unet)


def test_a_checkpoint_needs_no_published_model_any_more(published, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=2)
    module = DiffusionModule(pretrained=str(published))
    trainer.fit(module, DigitsDataModule(16, num_control=16, batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert same_weights(loaded, module)
    assert loaded.num_timesteps == 50
    assert str(published).encode() not in (tmp_path / "model.ckpt").read_bytes()


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "unet"), "there is no U-Net in it"),
        (lambda f: edit(f / "unet/config.json", _class_name="Evil"), "Evil is none of UNet2DModel"),
        (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline is"),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="KarrasVeScheduler"),
            "KarrasVeScheduler has no noise schedule",
        ),
        (lambda f: edit(f / "unet/config.json", layers_per_block=2), "weights are of another architecture"),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[4]), ""),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x"), ""),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), ""),
        (lambda f: (f / "model_index.json").write_text("{"), "line 1 column 2"),
    ],
)
def test_damaged_folders_are_one_line(published, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(published, folder)
    damage(folder)
    with pytest.raises(ValueError, match=r"^Argument `pretrained` expected a folder .* but got '.*damaged'") as error:
        DiffusionModule(pretrained=str(folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_id_without_network_says_that_a_local_path_works(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"but got 'google/ddpm-cifar10-32', .* Without network give a local path"):
        DiffusionModule(pretrained="google/ddpm-cifar10-32")


@pytest.mark.parametrize(("unet", "pretrained", "got"), [(None, None, "neither"), (tiny_unet, "x", "both")])
def test_one_source(unet, pretrained, got):
    with pytest.raises(ValueError, match=f"`unet` and `pretrained` expected one of them, but got {got}"):
        DiffusionModule(unet and unet(), pretrained=pretrained)


def test_another_architecture_is_one_line(tmp_path):
    module = tiny_diffusion()
    message = (
        r"but got \d+ of \d+ weights that differ: 'unet.conv_in.weight' "
        r"is of shape \(8, 1, 3, 3\) there, and of shape \(16, 1, 3, 3\) here"
    )
    with pytest.raises(ValueError, match=message):
        tiny_diffusion(unet={"block_out_channels": (16,)}).load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match=r"is missing there, and of shape"):
        module.load_state_dict({})
    assert module.load_state_dict({}, strict=False).missing_keys


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.filterwarnings("ignore:.*__array_(_|wrap).*:DeprecationWarning")  # of diffusers with numpy 2
def test_a_scheduler_swapped_for_sampling_says_what_was_trained_with(tmp_path, kind):
    trained = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001)
    DDPMPipeline(unet=tiny_unet(), scheduler=kind.from_config(trained.config)).save_pretrained(tmp_path)
    module = DiffusionModule(pretrained=str(tmp_path), ema_decay=0)
    assert isinstance(module.scheduler, kind)
    assert torch.equal(module.process.sampler("ddim").alphas_cumprod, trained.alphas_cumprod)
    assert module.sample(1, num_inference_steps=2).shape == (1, 1, 8, 8)
    assert type(load_pipeline(tmp_path).module.scheduler) is kind


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
def test_weights_of_which_only_a_variant_is_there(tmp_path, caplog, capfd, options, variant):
    torch.manual_seed(1)
    unet = tiny_unet()
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path, variant=variant, **options)
    for source in (tmp_path, tmp_path / "unet"):
        assert same_weights(DiffusionModule(pretrained=str(source)).unet, unet)
    assert (f"holds weights of the variant '{variant}' alone" in caplog.text) == (variant is not None)
    assert "error" not in capfd.readouterr().err.lower()


def test_the_plain_weights_go_before_their_variants(tmp_path):
    plain, half = tiny_unet(), tiny_unet()
    for unet, variant in ((plain, None), (half, "fp16")):
        unet.save_pretrained(tmp_path / "unet", variant=variant)
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    assert same_weights(load_pretrained(str(tmp_path / "unet"))[0], plain)


def test_several_variants_without_plain_weights_are_named(tmp_path):
    for variant in ("fp16", "non_ema"):
        tiny_unet().save_pretrained(tmp_path, variant=variant)
    with pytest.raises(ValueError, match="variants fp16, non_ema and no plain ones"):
        load_pretrained(str(tmp_path))


def test_a_network_without_a_schedule_wants_one(published, tmp_path):
    shutil.copytree(published / "unet", tmp_path / "alone" / "unet")
    with pytest.raises(
        ValueError, match=r"^Argument `scheduler` expected the noise schedule that '.*unet' was trained"
    ):
        DiffusionModule(pretrained=str(tmp_path / "alone" / "unet"))
    module = DiffusionModule(pretrained=str(tmp_path / "alone" / "unet"), scheduler=DDPMScheduler(beta_end=0.01))
    assert module.scheduler.config.beta_end == 0.01


def test_a_folder_of_networks_names_them(published, tmp_path):
    """As accelerate leaves them beside an optimizer: weights, and their average."""
    for name in ("unet", "unet_ema"):
        shutil.copytree(published / "unet", tmp_path / name)
    with pytest.raises(ValueError, match=r"Give one of its folders: unet, unet_ema\."):
        load_pretrained(str(tmp_path))


def test_a_file_of_weights_beside_its_configuration(published, tmp_path):
    shutil.copytree(published / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("mine.safetensors"))
    module = DiffusionModule(pretrained=str(file.with_name("mine.safetensors")), scheduler=DDPMScheduler())
    assert same_weights(module.unet, DDPMPipeline.from_pretrained(published).unet)
    assert module.unet.training
    edit(tmp_path / "unet" / "config.json", block_out_channels=[4])
    with pytest.raises(ValueError, match=r"another architecture.* weights that differ"):
        load_pretrained(str(file.with_name("mine.safetensors")))
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no '.*config.json'\. Put it there; .* TextToImageModule"):
        load_pretrained(str(file.with_name("mine.safetensors")))


def test_the_class_is_that_which_the_checkpoint_names(tmp_path, monkeypatch):
    module = tiny_diffusion(unet={"num_class_embeds": 3})
    save_checkpoint(module, tmp_path / "model.ckpt")
    loaded = load_any_module(tmp_path / "model.ckpt")
    assert loaded.conditioning == module.conditioning
    assert torch.equal(loaded.sample(2, num_inference_steps=2), module.sample(2, num_inference_steps=2))


def test_a_checkpoint_from_before_there_were_several(tmp_path):
    save_checkpoint(tiny_diffusion(), tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for name in ("module", "num_classes", "label_dropout", "guidance_scale"):
        del checkpoint["specification"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert load_any_module(tmp_path / "old.ckpt").conditioning is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"specification": {"module": "Evil"}}, "which is one of a Evil"),
        ({"state_dict": {}}, "which is none: it does not say what its model is"),
        ({"specification": {}}, "which does not say how to build its denoiser: that is none of diffusers"),
        (
            {"specification": {"module": "DiffusionModule", "unet": None}},  # what a denoiser of one's own leaves
            "which does not say how to build its denoiser: that is none of diffusers",
        ),
        ([1], "which holds a list"),
    ],
)
def test_other_files_are_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        load_any_module(tmp_path / "other.ckpt")
    assert "\n" not in str(error.value)


class OwnUNet(UNet2DModel):
    """A denoiser of one's own, with a configuration as diffusers keeps it."""


class OwnScheduler(DDPMScheduler):
    """A noise schedule of one's own."""


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("unet", lambda: OwnUNet.from_config(tiny_unet().config)),
        ("scheduler", lambda: OwnScheduler(beta_schedule="squaredcos_cap_v2")),
        ("scheduler", lambda: Bare()),
    ],
)
def test_a_class_that_diffusers_does_not_have_is_asked_for(tmp_path, name, make):
    own = make()
    module = DiffusionModule(own) if name == "unet" else DiffusionModule(tiny_unet(), scheduler=own)
    assert module.specification()[name] is None
    save_checkpoint(module, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=rf"Argument `{name}` expected .* load_from_checkpoint\(path, {name}=Your"):
        DiffusionModule.load_from_checkpoint(tmp_path / "own.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "own.ckpt", **{name: own})
    assert same_weights(loaded, module)


class Bare:
    """A noise schedule without ``from_config``."""

    def __init__(self):
        inner = DDPMScheduler()
        self.config, self.alphas_cumprod = inner.config, inner.alphas_cumprod


def test_a_checkpoint_that_names_an_unknown_class_of_diffusers_is_refused():
    with pytest.raises(ValueError, match=r"expected a class of diffusers, but got 'diffusers.MyUNet'"):
        build({"class_path": "diffusers.MyUNet", "config": {}})


def test_weights_of_another_architecture_are_one_line(tmp_path):
    module = tiny_diffusion()
    save_checkpoint(module, tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    checkpoint["specification"]["unet"]["config"]["block_out_channels"] = [16]
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError, match=r"^The checkpoint expected another architecture, but got \d+ of \d+ weights that differ"
    ):
        load_any_module(tmp_path / "model.ckpt")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("unet", [{}, {"in_channels": 3, "out_channels": 3, "sample_size": (4, 8)}])
def test_a_pipeline_draws_our_images_before_and_after_saving(tmp_path, sampler, unet):
    module = tiny_diffusion(unet=unet | {"dropout": 0.5}, channels_last=True).train()
    with torch.no_grad():
        module.ema.module.conv_in.bias += 1  # the averaged weights are others
    pipeline = module.pipeline(sampler=sampler)
    ours = module.sample(5, seed=4, sampler=sampler, num_inference_steps=3)[2:]
    torch.testing.assert_close(drawn(pipeline, [2, 3, 4], seed=4), ours, rtol=1e-5, atol=1e-5)
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler])
    assert torch.equal(drawn(loaded, [2, 3, 4], seed=4), drawn(pipeline, [2, 3, 4], seed=4))


def test_the_weights_themselves_and_weights_of_its_own():
    module = tiny_diffusion()
    with torch.no_grad():
        module.unet.conv_in.bias += 1
    pipeline = module.pipeline(use_ema=False)
    before = pipeline.unet.conv_in.bias.clone()
    assert torch.equal(before, module.unet.conv_in.bias)
    with torch.no_grad():
        module.unet.conv_in.bias += 1
    assert torch.equal(pipeline.unet.conv_in.bias, before)
    assert module.unet.conv_in.bias.requires_grad
    assert module.unet.training


@pytest.mark.parametrize("make", [lambda: tiny_unet(num_class_embeds=11), tiny_dit])
def test_a_class_conditional_pipeline_is_loadable(tmp_path, make):
    module = DiffusionModule(make(), ema_decay=0.9)
    module.pipeline().save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    images, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 3]), torch.tensor([1, 10])
    with torch.no_grad():
        expected = module.eval()(images, t, labels)
        assert torch.equal(loaded.unet(images, t, class_labels=labels).sample, expected)


def test_other_denoisers_make_no_pipeline():
    with pytest.raises(TypeError, match=r"UNet2DModel or DiTTransformer2DModel .* but got Conv2d"):
        DiffusionModule(nn.Conv2d(1, 1, 1)).pipeline()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["diffusion_pytorch_model.safetensors"], {"variant": None, "use_safetensors": True}),
        (["diffusion_pytorch_model.bin"], {"variant": None, "use_safetensors": False}),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"],
         {"variant": None, "use_safetensors": True}),
        (["diffusion_pytorch_model.fp16.bin"], {"variant": "fp16", "use_safetensors": False}),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], {"variant": "fp16", "use_safetensors": True}),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], {"variant": None, "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text/model.fp16.safetensors"],
         {"variant": "fp16", "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text/model.safetensors"],
         {"variant": "fp16", "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.safetensors", "text/pytorch_model.bin"], {"variant": None}),
        (["config.json", "optimizer.bin"], {}),
    ],
)  # fmt: skip
def test_what_is_asked_for(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert which_weights(tmp_path) == expected


def test_parts_of_different_variants_are_refused(tmp_path):
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="variants bf16, fp16 and no plain ones"):
        which_weights(tmp_path)
