"""ParameterSelection with this package's modules, with shards, on processes, and from a checkpoint on."""

import copy
import functools
import re

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from lightning.pytorch import Callback
from torch import nn

from lightning_iet import AntiGradientControl, DiffusionModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.audit.generator import load_checkpoint
from lightning_iet.callbacks.parameter_selection import ParameterSelection
from lightning_iet.functional.parameter_groups import find_groups
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules import TextToImageModule
from lightning_iet.modules.adapters import Selection
from lightning_iet.modules.pipelines import load_pipeline
from lightning_iet.modules.svdiff import spectral_shifts
from lightning_iet.tools.export import export
from lightning_iet.tools.plan import PlanningTrainer
from tests.helpers.models import quiet_trainer
from tests.helpers.shards import Spied, digits
from tests.helpers.text_to_image import CaptionedData, make_module, save_pipelines
from tests.helpers.unets import small_pixel_unet, small_sd_unet
from tests.helpers.weights import assert_same_bits, state_of

FAMILIES = ["bias", "svdiff", "difffit", "lora"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def diffusion(optimizer=adamw, seed=0, **kwargs):
    return DiffusionModule(small_pixel_unet(seed), **{"ema_decay": 0.5, "optimizer": optimizer} | kwargs)


def fit(folder, module, *callbacks, shards=None, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(7)
    data = data or digits(16)
    if shards:
        data = ShardedDataModule(data, shards, partition="iid")
        callbacks = (*callbacks, ParameterAveragingCallback(shards))
    settings = {"max_epochs": 1, "limit_val_batches": 0}
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **settings | kwargs)
    trainer.fit(module, data, ckpt_path=ckpt_path, **({} if ckpt_path is None else {"weights_only": True}))
    return trainer


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


class Patches(nn.Module):
    """A wrapper around a network, as people write them."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, images, timesteps):
        return self.unet(images, timesteps).sample


def test_a_denoiser_in_a_wrapper_trains_as_it_does_alone(tmp_path):
    family = "svdiff"
    groups = find_groups(small_pixel_unet(0), family)
    mask = "10" * (len(groups.groups) // 2) + "1" * (len(groups.groups) % 2)
    alone, wrapped = diffusion(), DiffusionModule(Patches(small_pixel_unet(0)), ema_decay=0.5, optimizer=adamw)
    for module in (alone, wrapped):
        selection = ParameterSelection(family, mask=mask)
        fit(tmp_path, module, selection)
        assert [group.name for group in selection.parameter_groups.groups] == [group.name for group in groups.groups]
    assert {name.replace("unet.unet.", "unet.") for name in trained_names(wrapped)} == trained_names(alone)
    assert_same_bits(state_of(wrapped.unet.unet), state_of(alone.unet))


# --- optimizer, average, checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "optimizer"), [("bias", sgd), ("svdiff", adamw), ("difffit", sgd), ("lora", adamw)])
def test_only_what_is_selected_is_optimized_moved_and_averaged(tmp_path, family, optimizer):
    module, start = diffusion(optimizer), dict(diffusion().unet.named_parameters())
    selection = ParameterSelection(family)
    trainer = fit(tmp_path, module, selection)
    trained = trained_names(module)
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(module.get_parameter(name)) for name in trained)
    assert set(trainer.optimizers[0].state) == {module.get_parameter(name) for name in trained}
    frozen = {name for name, _ in module.unet.named_parameters()} - {name.removeprefix("unet.") for name in trained}
    for name in frozen:
        stock = name.replace("parametrizations.weight.original", "weight").replace("base_layer.", "")
        assert torch.equal(module.unet.get_parameter(name), start[stock]), name
    assert [f"unet.{name}" for name in module.ema.weights()] == [
        n for n, p in module.named_parameters() if n in trained
    ]
    assert any(not torch.equal(average, module.unet.get_parameter(n)) for n, average in module.ema.weights().items())


def test_the_average_is_that_of_every_step(tmp_path):
    module = diffusion()
    course = []

    class Watch(ParameterSelection):
        def on_train_start(self, trainer, pl_module):
            course.append(
                {name: p.detach().clone() for name, p in pl_module.unet.named_parameters() if p.requires_grad}
            )

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.on_train_start(trainer, pl_module)

    fit(tmp_path, module, Watch("svdiff"))
    expected = course[0]
    for state in course[1:]:
        expected = {name: expected[name].lerp(state[name], 0.5) for name in expected}
    for name, average in module.ema.weights().items():
        torch.testing.assert_close(average.detach(), expected[name])
    images, times = torch.rand(3, 1, 8, 8), torch.tensor([1, 2, 3])
    with torch.no_grad():
        averaged = module(images, times, use_ema=True)
        assert not torch.equal(averaged, module(images, times))
        module.unet.load_state_dict(module.ema.weights(), strict=False)
        assert torch.equal(averaged, module(images, times))


@pytest.mark.parametrize("family", ["all", "svdiff"])
def test_all_ones_are_the_family_and_everything_is_plain_training(tmp_path, family):
    ends = []
    for callbacks in ([ParameterSelection(family)], [ParameterSelection(family, mask="1")]):
        module = diffusion(sgd)
        if callbacks[0].selection.mask is not None:
            ones = "1" * len(find_groups(module.unet, family).bits)
            callbacks = [ParameterSelection(family, mask=ones)]
        fit(tmp_path, module, *callbacks)
        ends.append(state_of(module.unet))
    assert_same_bits(*ends)
    if family == "all":
        module = diffusion(sgd)
        fit(tmp_path, module)
        assert_same_bits(state_of(module.unet), ends[0])


def test_a_neutral_selection_leaves_the_checkpoint_as_it_was(tmp_path):
    files = []
    for callbacks in ([], [ParameterSelection()]):
        fit(tmp_path, diffusion(), *callbacks).save_checkpoint(tmp_path / "last.ckpt")
        files.append((tmp_path / "last.ckpt").read_bytes())
    assert files[0] == files[1]


def test_shifts_of_norms_learn_more_slowly(tmp_path):
    module = diffusion(warmup_steps=2)
    trainer = fit(tmp_path, module, ParameterSelection("svdiff", norm_lr_scale=0.1), max_steps=4, max_epochs=-1)
    fast, slow = trainer.optimizers[0].param_groups
    assert (fast["lr"], slow["lr"]) == pytest.approx((1e-2, 1e-3))
    norms = [layer for layer in module.unet.modules() if isinstance(layer, nn.GroupNorm)]
    assert {id(p) for p in slow["params"]} == {id(layer.parametrizations.weight[0].shift) for layer in norms}
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([1e-2, 1e-3])
    assert max(p.abs().max() for p in slow["params"]) < 0.2 * max(p.abs().max() for p in fast["params"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(family)``: a module after an epoch, and its checkpoint."""

    @functools.cache
    def get(family):
        module, path = diffusion(), tmp_path_factory.mktemp(family) / "last.ckpt"
        fit(path.parent, module, ParameterSelection(family)).save_checkpoint(path)
        return module, path

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_brings_its_selection(tmp_path, trained, family):
    module, path = trained(family)
    loaded = DiffusionModule.load_from_checkpoint(path)
    assert_same_bits(state_of(loaded), state_of(module))
    assert loaded.selection == Selection(family)
    assert torch.equal(loaded.sample(2, num_inference_steps=2), module.sample(2, num_inference_steps=2))
    with pytest.raises(ValueError, match="expected one selection of parameters, but got a second one"):
        loaded.select_parameters(Selection("norm"))
    if family != "svdiff":  # what follows reads the selection alone: it is tried where weights have other names
        return
    # Evaluation needs no callback; training goes on with the same selection only.
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        quiet_trainer(tmp_path, limit_val_batches=1).validate(
            diffusion(seed=1), digits(16), ckpt_path=path, weights_only=True, verbose=False
        )
    for callbacks, expected in (([], "module"), ([ParameterSelection("norm")], "selection under which")):
        with pytest.raises(ValueError, match=f"^The checkpoint expected a {expected}"):
            fit(tmp_path, diffusion(), *callbacks, ckpt_path=path, max_epochs=2)


@pytest.mark.parametrize(
    ("changes", "scale", "message"),
    [
        ({}, 0.1, "norm_lr_scale was 0.01 and is 0.1"),
        ({"mask": "11"}, 0.01, "mask was '10' and is '11'"),
        (
            {"family": "bias", "groups": {"a": "x"}},
            0.01,
            "family was 'svdiff' and is 'bias', groups was {'a': 'conv_in', ",
        ),
    ],
)
def test_a_refused_checkpoint_names_what_differs(changes, scale, message):
    options = {"family": "svdiff", "mask": "10", "groups": {"a": "conv_in", "b": "mid"}}
    module, checkpoint = diffusion(), {}
    module.selection, module.norm_lr_scale = Selection(**options), 0.01
    module.on_save_checkpoint(checkpoint)
    module.selection, module.norm_lr_scale = Selection(**{**options, **changes}), scale
    with pytest.raises(ValueError, match=re.escape(message)):
        module.on_load_checkpoint(checkpoint)


class SaveAt(Callback):
    """Saves at one step of a process."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# Of 8 steps: within a shard, and between shards in the second epoch.
@pytest.mark.parametrize(("family", "step"), [("svdiff", 3), ("lora", 6)])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(tmp_path, family, step):
    whole, again = diffusion(), diffusion(seed=1 if family != "lora" else 0)
    cut = tmp_path / "cut.ckpt"
    methods = [ParameterSelection(family), AntiGradientControl(0.5)]
    trainer = fit(tmp_path, whole, *methods, SaveAt(step, cut), shards=2, max_epochs=2)
    assert trainer.global_step == 8
    methods = [ParameterSelection(family), AntiGradientControl(0.5)]
    fit(tmp_path, again, *methods, shards=2, max_epochs=2, ckpt_path=cut)
    assert_same_bits(state_of(again), state_of(whole))


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """``averaged(family)``: a module after one round of two shards, and the callback that watched their averaging."""

    @functools.cache
    def get(family):
        module, averaging = diffusion(), Spied(2)
        torch.manual_seed(7)
        callbacks = [ParameterSelection(family), averaging]
        trainer = quiet_trainer(tmp_path_factory.mktemp(family), callbacks=callbacks, limit_val_batches=0, max_epochs=1)
        trainer.fit(module, ShardedDataModule(digits(16), 2, partition="iid"))
        return module, averaging

    return get


@pytest.mark.parametrize("family", ["bias", "svdiff"])
def test_shards_average_what_trains_and_share_the_rest(averaged, family):
    module, averaging = averaged(family)
    trained = trained_names(module)
    before, after = averaging.before[0], averaging.after[0]
    averages = {f"ema.module.{number}" for number in range(len(trained))}
    assert set(before[0]) == trained | averages
    for name in before[0]:
        mean = (before[0][name].double() + before[1][name].double()) / 2
        torch.testing.assert_close(after[0][name].double(), mean, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(before[0][name], before[1][name]) for name in before[0])


def test_average_of_shifts_is_the_average_of_weights(averaged):
    module, averaging = averaged("svdiff")
    weights = []
    network = copy.deepcopy(module.unet)
    for states in (averaging.before[0][0], averaging.before[0][1], averaging.after[0][0]):
        shifts = {name.removeprefix("unet."): value for name, value in states.items() if name.startswith("unet.")}
        network.load_state_dict(shifts, strict=False)
        # Where all shifted values are above zero the weight is affine in the shift.
        weights.append({
            name: network.get_submodule(name).weight.detach().double()
            for name, shift in spectral_shifts(network).items()
        })  # fmt: skip
    affine = [
        name
        for name, shift in spectral_shifts(network).items()
        if all(
            (shift.basis.on("cpu")[1] + state[f"unet.{name}.parametrizations.weight.0.shift"] >= 0).all()
            for state in averaging.before[0]
        )
    ]
    assert len(affine) > 5
    for name in affine:
        torch.testing.assert_close((weights[0][name] + weights[1][name]) / 2, weights[2][name], rtol=0, atol=1e-6)


def fit_on(folder, world_size, family, ckpt_path=None, save=()):
    """Train four shards on some processes."""
    torch.manual_seed(7)
    module = diffusion()
    data = ShardedDataModule(digits(16), 4, partition="iid")
    methods = [AntiGradientControl(0.5), ParameterSelection(family), ParameterAveragingCallback(4)]
    trainer = quiet_trainer(
        folder,
        callbacks=[*methods, *save],
        limit_val_batches=0,
        max_epochs=2,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, **({} if ckpt_path is None else {"weights_only": True}))
    return state_of(module)


def test_any_number_of_processes_ends_in_the_same_bits(tmp_path, processes):
    family = "svdiff"
    (alone,) = processes(1).run(fit_on, tmp_path, 1, family)
    cut = tmp_path / "cut.ckpt"
    for state in processes(2).run(fit_on, tmp_path, 2, family, save=[SaveAt(3, cut)]):
        assert_same_bits(state, alone)
    (resumed,) = processes(1).run(fit_on, tmp_path, 1, family, ckpt_path=cut)
    assert_same_bits(resumed, alone)


# --- text to image ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.mark.parametrize(
    ("kind", "family", "shards"), [("sd1", "svdiff", 2), ("sd2", "norm", None), ("sdxl", "lora", None)]
)
def test_a_text_to_image_module(folders, tmp_path, kind, family, shards):
    module = make_module(folders[kind])
    trainer = fit(tmp_path, module, ParameterSelection(family), shards=shards, data=CaptionedData(4))
    trained = trained_names(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    averages = {f"ema.module.{number}" for number in range(len(trained))}
    assert set(saved["state_dict"]) - {"ema.n_averaged"} == trained | averages
    loaded = TextToImageModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_bits(state_of(loaded), state_of(module))
    assert loaded.selection == Selection(family)

    arguments = {"prompts": ["a dog"], "num_inference_steps": 2, "guidance_scale": 3.0}
    images = module.sample(1, **arguments)
    assert torch.equal(loaded.sample(1, **arguments), images)
    export(tmp_path / "last.ckpt", out=tmp_path / "exported", sampler="ddim")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a dog", num_inference_steps=2, guidance_scale=3.0, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(derive_seed(0, 0)),
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, images, rtol=0, atol=1e-4)


def test_the_published_bits_on_a_pipeline_of_the_real_classes(folders, tmp_path):
    pipeline = load_pipeline(folders["sd1"])
    pipeline.unet = small_sd_unet()
    pipeline.save_pretrained(tmp_path / "sd")
    module = make_module(tmp_path / "sd", image_size=16, optimizer=sgd)
    start = {name: p.detach().clone() for name, p in module.unet.named_parameters() if name.endswith("bias")}
    selection = ParameterSelection("svdiff", mask="1010101010101", granularity="published")
    fit(tmp_path, module, selection, data=CaptionedData(4), max_epochs=1)
    on = [group.name for group in selection.parameter_groups.groups][::2]
    for name, shift in spectral_shifts(module.unet).items():
        block, inside, _ = name.partition(".transformer_blocks.")
        assert not inside or block in on or (block.startswith("up_blocks") and block.endswith("attentions.2"))
        if name.startswith("mid_block") and name.endswith(("attn1.to_q", "attn1.to_k")):
            continue  # of 1 × 1 there: one token attends to itself alone, so no gradient but rounding reaches these
        assert shift.shift.abs().sum() > 0, name
    for name, parameter in start.items():
        assert torch.equal(module.unet.get_parameter(name), parameter)


def test_a_plan_has_the_share_of_the_denoiser_alone(folders):
    module = make_module(folders["sd1"])
    network = sum(parameter.numel() for parameter in module.unet.parameters())
    cost = PlanningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[ParameterSelection("bias")]
    ).plan(module, CaptionedData())
    assert cost.denoiser == network
    assert cost.size.frozen > network


def test_lora_rank_and_a_selection_are_one_too_many(folders, tmp_path):
    with pytest.raises(ValueError, match=r"`lora_rank` expected None beside a selection .*, but got 2"):
        fit(tmp_path, make_module(folders["sd1"], lora_rank=2), ParameterSelection("bias"), data=CaptionedData())


# --- what is handed on ------------------------------------------------------------------------------------------------


# LoRA's is folded above, in a pipeline of text to image.
@pytest.mark.parametrize("family", ["svdiff", "difffit"])
def test_an_export_is_plain_diffusers_and_draws_the_same(tmp_path, trained, family):
    module, path = trained(family)
    export(path, out=tmp_path / "exported", sampler="ddim")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "exported", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    stock = {name: tensor.shape for name, tensor in small_pixel_unet().state_dict().items()}
    assert {name: tensor.shape for name, tensor in pipeline.unet.state_dict().items()} == stock
    images = module.sample(1, sampler="ddim", num_inference_steps=3)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(3)
    drawn = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, 0)))
    with torch.no_grad():
        for step in scheduler.timesteps:
            drawn = scheduler.step(pipeline.unet(drawn, step).sample, step, drawn).prev_sample
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-4)
    assert len(load_checkpoint(path, use_ema=family == "svdiff").sha256) == 64


def test_weights_are_formed_once_for_a_batch_of_images(tmp_path):
    module = diffusion(ema_decay=0.0)
    ParameterSelection("svdiff").apply(module)
    calls = []
    for shift in spectral_shifts(module.unet).values():
        shift.register_forward_hook(lambda *args: calls.append(1))
    module.sample(2, num_inference_steps=5)
    assert len(calls) == len(spectral_shifts(module.unet))


def test_a_mask_that_does_not_fit_is_one_line_before_the_first_step(tmp_path):
    bits = len(find_groups(small_pixel_unet(), "svdiff").bits)
    with pytest.raises(ValueError, match=re.escape(f"`mask` expected {bits - 1} or {bits} characters")):
        fit(tmp_path, diffusion(), ParameterSelection("svdiff", mask="01"))
