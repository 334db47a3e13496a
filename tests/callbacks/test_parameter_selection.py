import copy
import re
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks import AntiGradientControl, parameter_selection
from lightning_iet.callbacks.parameter_selection import ParameterSelection, find_denoiser, write_mask
from lightning_iet.functional.parameter_groups import find_groups
from lightning_iet.modules.svdiff import spectral_shifts
from tests.helpers.devices import CountWaits
from tests.helpers.models import quiet_trainer
from tests.helpers.unets import small_dit, small_pixel_unet

FAMILIES = ("all", "attention", "norm", "bias", "norm_bias", "svdiff", "difffit", "lora")
DENOISER = "unet"


class Project(pl.LightningModule):
    """Somebody's module that knows nothing of this package."""

    def __init__(self, unet=None, optimizer=None):
        super().__init__()
        self.text = nn.Linear(2, 2).requires_grad_(False)
        nn.init.ones_(self.text.weight), nn.init.zeros_(self.text.bias)
        self.unet = unet
        self.make_optimizer = optimizer or (
            lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)
        )

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        images = torch.rand(batch[0].shape, generator=generator)  # after a resume, Lightning begins the data anew
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(1000, (len(images),), generator=generator)
        return nn.functional.mse_loss(self.unet(images + noise, timesteps).sample, noise)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def project(seed=0, **kwargs):
    return Project(small_pixel_unet(seed), **kwargs)


def loader():
    return DataLoader(TensorDataset(torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))), 2)


def fit(tmp_path, module, *callbacks, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 1, **kwargs})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ended before the epoch ended.*")  # the loader is not shuffled
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def messages(monkeypatch):
    """What is logged."""
    heard = []
    monkeypatch.setattr(parameter_selection, "rank_zero_info", heard.append)
    return heard


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_project_trains_what_is_selected(tmp_path, family, messages):
    module = project()
    selection = ParameterSelection(family)
    trainer = fit(tmp_path, module, selection)
    trained = {f"unet.{name}" for group in selection.parameter_groups.groups for name in group.parameters}
    trained |= {f"unet.{name}" for name in selection.parameter_groups.rest}
    parameters = dict(module.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == trained
    assert selection.num_trained == sum(parameters[name].numel() for name in trained)
    held = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} >= {id(parameters[name]) for name in trained}
    assert not any(id(parameter) in map(id, held) for name, parameter in parameters.items()
                   if name.startswith("unet.") and name not in trained)  # fmt: skip
    assert messages[0] == selection.description
    assert module.on_load_checkpoint.__self__ is module  # its methods are its own again


def test_frozen_parameters_do_not_move_and_all_ones_are_the_family(tmp_path):
    stock = dict(project().unet.named_parameters())
    ends = []
    for mask in (None, "1" * len(find_groups(project().unet, "bias").bits)):
        module = project()
        fit(tmp_path, module, ParameterSelection("bias", mask=mask), max_epochs=2)
        ends.append(weights(module))
        moved = {name for name, parameter in module.unet.named_parameters() if not torch.equal(parameter, stock[name])}
        assert moved
        assert all(name.endswith("bias") for name in moved)
    assert equal(*ends)


@pytest.mark.parametrize("family", ["bias", "svdiff"])
def test_no_step_waits_for_the_device(tmp_path, family):
    def waits(steps, *callbacks):
        with CountWaits() as counted:
            fit(tmp_path, project(), *callbacks, limit_train_batches=steps)
        return counted.count

    more = waits(3, ParameterSelection(family)) - waits(1, ParameterSelection(family))
    assert more == waits(3) - waits(1)


def test_everything_selected_changes_nothing_at_all(tmp_path):
    checkpoints = []
    for callbacks in ([], [ParameterSelection()]):
        module = project()
        trainer = fit(tmp_path, module, *callbacks)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        checkpoints.append((tmp_path / "last.ckpt").read_bytes())
    assert checkpoints[0] == checkpoints[1]


def test_one_line_says_what_trains(tmp_path, messages):
    module = project()
    groups = find_groups(module.unet, "svdiff")
    mask = "1" * 2 + "0" * (len(groups.groups) - 2) + "1"
    selection = ParameterSelection("svdiff", mask=mask)
    selection.apply(module)
    count, total = groups.count(mask), sum(parameter.numel() for parameter in small_pixel_unet().parameters())
    assert messages[0] == (
        f"ParameterSelection: svdiff in 2 of {len(groups.groups)} blocks and in the rest; {count:,} for {total:,} "
        f"parameters ({100 * count / total:.4f} %)"
    )
    assert "the shifts of norms learn as fast as others" in messages[1]  # once
    assert len(messages) == 2
    assert selection.share == count / total
    other = ParameterSelection("bias", groups={"last": "^conv_out"}, rest=False)
    other.apply(project())
    assert "bias in 1 of 1 groups, not in the rest; 1 for" in messages[2]


def test_optimizer_memory_is_that_of_what_trains(tmp_path):
    sizes = {}
    for family in ("all", "bias", "svdiff"):
        selection = ParameterSelection(family)
        module = project(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1))
        trainer = fit(tmp_path, module, selection)
        state = trainer.optimizers[0].state.values()
        sizes[family] = sum(v.numel() for values in state for v in values.values() if v.ndim)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert sizes[family] == 2 * trained
    assert sizes["bias"] < 0.05 * sizes["all"]


def test_mask_from_a_file(tmp_path, messages):
    module = project()
    groups = find_groups(module.unet, "svdiff", granularity="attention")
    file = write_mask(tmp_path / "mask.json", groups, "10100")
    selection = ParameterSelection(file=file)
    selection.apply(module)
    expected = {groups.groups[0].name, groups.groups[2].name}
    assert {".".join(name.split(".")[:4]) for name in spectral_shifts(module.unet)} >= expected
    assert messages[0].startswith("ParameterSelection: svdiff in 2 of 4 blocks, not in the rest; ")
    same = {"family": "svdiff", "granularity": "attention", "mask": "1010", "rest": False}
    assert ParameterSelection(file=file, **same).selection == selection.selection
    for option, given, saved in (
        ("family", "bias", "svdiff"),
        ("mask", "1", "1010"),
        ("granularity", "published", "attention"),
        ("rest", True, False),
        ("groups", {"a": "b"}, None),
    ):
        message = f"something else, but got {option} {given!r}, where '{file}' has {saved!r}. Leave {option}, or the"
        with pytest.raises(ValueError, match=re.escape(message)):
            ParameterSelection(file=file, **{**same, option: given})
    with pytest.raises(ValueError, match=r"group 0 is down_blocks\.1\.attentions\.0 there, and transformer_blocks\.0"):
        ParameterSelection(file=file).apply(Project(small_dit()))


def test_together_with_anti_gradient_control(tmp_path):
    module, agc = project(), AntiGradientControl(threshold=0.5)
    fit(tmp_path, module, agc, ParameterSelection("bias"), max_epochs=2)
    stock = dict(project().unet.named_parameters())
    moved = {name for name, parameter in module.unet.named_parameters() if not torch.equal(parameter, stock[name])}
    assert moved
    assert all(name.endswith("bias") for name in moved)


# --- where the denoiser is --------------------------------------------------------------------------------------------


class Late(Project):
    """Makes its network in a hook."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def setup(self, stage):
        if self.hook == "setup" and self.unet is None:
            self.unet = small_pixel_unet()

    def configure_model(self):
        if self.unet is None:
            self.unet = small_pixel_unet()


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_network_made_in_a_hook(tmp_path, hook):
    ends = []
    for module in (Late(hook), project()):
        fit(tmp_path, module, ParameterSelection("svdiff"))
        ends.append(weights(module))
    assert equal(*ends)
    assert len(spectral_shifts(module.unet)) > 10


def test_network_is_found_by_its_blocks():
    unet = small_pixel_unet()
    wrapped = nn.ModuleDict({"vae": small_pixel_unet().requires_grad_(False), "model": nn.ModuleDict({"net": unet})})
    wrapped["ema"] = copy.deepcopy(wrapped["model"]).requires_grad_(False)
    assert find_denoiser(wrapped) is unet
    assert find_denoiser(wrapped, "vae") is wrapped["vae"]
    assert find_denoiser(nn.Linear(2, 2)) is None
    itself = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)]), "out": nn.Linear(1, 1)})
    assert find_denoiser(itself) is itself
    plain = nn.ModuleDict({"net": nn.Linear(1, 1), "text": nn.Linear(1, 1).requires_grad_(False)})
    assert find_denoiser(plain, any_network=True) is plain["net"]
    frozen = nn.ModuleDict({"unet": small_pixel_unet().requires_grad_(False)})
    assert find_denoiser(frozen) is frozen["unet"]


def test_network_that_is_not_there_or_there_twice(tmp_path):
    two = project()
    two.other = small_dit()
    with pytest.raises(ValueError, match=r"expected a name, for Project has 2 networks that could be it: unet, other"):
        fit(tmp_path, two, ParameterSelection("bias"))
    with pytest.raises(ValueError, match=r"`denoiser` expected the name of a module in Project, such as .*text"):
        fit(tmp_path, project(), ParameterSelection("bias", denoiser="net"))
    with pytest.raises(ValueError, match="expected a denoiser with blocks in Project, but found none"):
        fit(tmp_path, Project(nn.Linear(2, 2)), ParameterSelection("bias"))
    fit(tmp_path, two, ParameterSelection("bias", denoiser="unet"))


def test_groups_by_regular_expressions_need_no_blocks(tmp_path):
    class Plain(Project):
        def training_step(self, batch, batch_idx):
            return self.unet(batch[0].flatten(1)).square().mean()

    module = Plain(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 1)))
    before = weights(module)
    fit(tmp_path, module, ParameterSelection("all", groups={"last": r"^1\."}, rest=False))
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"unet.1.weight", "unet.1.bias"}


# --- averages of the weights ------------------------------------------------------------------------------------------


class Averaging(Project):
    """Keeps an average of its denoiser."""

    def __init__(self, unet, kind):
        super().__init__(unet)
        if kind == "deepcopy":
            self.ema = copy.deepcopy(unet).requires_grad_(False)
        elif kind == "AveragedModel":
            self.ema = AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        else:
            self.shadow = [parameter.detach().clone() for parameter in unet.parameters()]

    def on_train_batch_end(self, *args):
        if isinstance(getattr(self, "ema", None), AveragedModel):
            self.ema.update_parameters(self.unet)
        elif hasattr(self, "ema"):
            for averaged, parameter in zip(self.ema.parameters(), self.unet.parameters(), strict=True):
                averaged.lerp_(parameter.detach(), 0.5)


@pytest.mark.parametrize("family", ["bias", "svdiff", "difffit", "lora"])
@pytest.mark.parametrize("kind", ["deepcopy", "AveragedModel"])
def test_average_of_a_project_follows(tmp_path, family, kind):
    module = Averaging(small_pixel_unet(), kind)
    course = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            course.append({name: p.detach().clone() for name, p in pl_module.unet.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.on_train_start(trainer, pl_module)

    fit(tmp_path, module, ParameterSelection(family), Watch(), max_epochs=1)
    average = module.ema.module if kind == "AveragedModel" else module.ema
    assert [name for name, _ in average.named_parameters()] == list(course[-1])
    lags = False
    for name, parameter in average.named_parameters():
        start, *states = course if kind == "deepcopy" else course[1:]  # the first update of an AveragedModel copies
        expected = start[name]
        for state in states:
            expected = expected.lerp(state[name], 0.5)
        torch.testing.assert_close(parameter.detach(), expected)
        lags |= not torch.equal(parameter, course[-1][name])
        assert not parameter.requires_grad
    assert lags
    for name, shift in spectral_shifts(module.unet).items():
        assert spectral_shifts(average)[name].basis is shift.basis


def test_average_in_plain_tensors_would_lack_adapters(tmp_path):
    fit(tmp_path, Averaging(small_pixel_unet(), "tensors"), ParameterSelection("bias"))
    with pytest.raises(ValueError, match=r"no average of the weights in plain tensors, .*but got 'shadow.0'"):
        fit(tmp_path, Averaging(small_pixel_unet(), "tensors"), ParameterSelection("svdiff"))


def test_weight_averaging_comes_later(tmp_path):
    with pytest.raises(MisconfigurationException, match="expected to come before EMAWeightAveraging"):
        fit(tmp_path, project(), EMAWeightAveraging(), ParameterSelection("svdiff"))
    average = EMAWeightAveraging(decay=0.5)
    module = project()
    fit(tmp_path, module, ParameterSelection("svdiff"), average)
    assert any(parameter.abs().sum() > 0 for name, parameter in module.named_parameters() if "shift" in name)


# --- optimizers, strategies, checkpoints ------------------------------------------------------------------------------


def test_optimizer_made_too_early_is_refused(tmp_path):
    module = project()
    early = torch.optim.SGD(module.parameters(), lr=1e-2)
    module.make_optimizer = lambda parameters: early
    with pytest.raises(MisconfigurationException, match=r"with parameters of the family 'svdiff', such as '.*shift'"):
        fit(tmp_path, module, ParameterSelection("svdiff"))


def test_optimizer_of_a_part_is_told(tmp_path):
    module = project(
        optimizer=lambda parameters: torch.optim.SGD([next(p for p in parameters if p.requires_grad)], 0.1)
    )
    with pytest.warns(UserWarning, match="parameters that no optimizer trains"):
        fit(tmp_path, module, ParameterSelection("bias"))


@pytest.mark.parametrize("is_derived", [False, True])
@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(name, is_derived):
    kind = type(name, (), {})
    if is_derived:
        kind = type("Own", (kind,), {})
    with pytest.raises(MisconfigurationException, match=f"keeps parameters whole, but got {kind.__name__}"):
        ParameterSelection("bias").setup(SimpleNamespace(strategy=kind()), project(), "fit")


@pytest.mark.parametrize(("family", "step"), [("bias", 3), ("svdiff", 1), ("svdiff", 3), ("difffit", 2), ("lora", 1)])
def test_resume_from_any_step(tmp_path, family, step):
    whole = project()
    fit(tmp_path, whole, ParameterSelection(family), max_steps=4, max_epochs=-1)
    torch.manual_seed(1)
    trainer = fit(tmp_path, project(), ParameterSelection(family), max_steps=step, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    second = project()
    fit(tmp_path, second, ParameterSelection(family), ckpt_path=tmp_path / "cut.ckpt", max_steps=4, max_epochs=-1)
    assert equal(weights(whole), weights(second))


def test_resume_with_another_selection_is_refused(tmp_path):
    for family in ("svdiff", "bias", "all"):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / family, filename="last")
        fit(tmp_path, project(), ParameterSelection(family), checkpoint, enable_checkpointing=True, max_steps=1)
    for saved, given, message in (
        ("svdiff", ParameterSelection("bias"), "which 'svdiff' by block trains, but got one under which 'bias' by blo"),
        ("bias", ParameterSelection("svdiff"), "which 'bias' by block trains, but got one under which 'svdiff' by blo"),
        ("bias", ParameterSelection("bias", rest=False), "but got one under which 'bias' by block, rest off does"),
        ("all", ParameterSelection("svdiff"), "under which everything trains, but got one under which 'svdiff'"),
        ("svdiff", ParameterSelection(), "which 'svdiff' by block trains, but got one under which everything does"),
    ):
        module = project()
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(tmp_path, module, given, ckpt_path=tmp_path / saved / "last.ckpt", max_epochs=2)
        assert module.on_load_checkpoint.__self__ is module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"a": "conv_in", "b": "mid"}}, "groups was {'a': 'conv_in'} and is {'a': 'conv_in', 'b': 'mid'}"),
        ({"lora_alpha": 8.0}, "lora_alpha was 4.0 and is 8.0"),
        ({"lora_targets": ["to_q", "to_k"]}, "lora_targets was ['to_q'] and is ['to_q', 'to_k']"),
    ],
)
def test_a_refused_resume_names_what_differs(changes, message):
    options = {"groups": {"a": "conv_in"}, "lora_alpha": 4.0, "lora_targets": ["to_q"]}
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    saved, own = ParameterSelection("bias", **options), ParameterSelection("bias", **{**options, **changes})
    with pytest.raises(ValueError, match=re.escape(f"'bias' by block trains, but got another one: {message}. Use the")):
        own._check_same(trainer, {"callbacks": {own.state_key: saved.state_dict()}})
    own._check_same(trainer, {"callbacks": {own.state_key: own.state_dict()}})


def test_validation_of_a_checkpoint_with_adapters(tmp_path):
    module = project()
    trainer = fit(tmp_path, module, ParameterSelection("svdiff"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Validated(Project):
        def validation_step(self, batch, batch_idx):
            assert len(spectral_shifts(self.unet)) > 10

    other = Validated(small_pixel_unet(seed=1))
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterSelection("svdiff")])
    trainer.validate(other, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    images, times = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(other.unet.eval()(images, times).sample, module.unet.eval()(images, times).sample)


def test_the_same_callback_fits_twice(tmp_path):
    module, selection = project(), ParameterSelection("svdiff")
    for _ in range(2):
        fit(tmp_path, module, selection)
    assert not any(hasattr(layer, "parametrizations") and len(layer.parametrizations.weight) > 1
                   for layer in module.unet.modules() if hasattr(layer, "parametrizations"))  # fmt: skip


def test_the_same_callback_selects_in_the_next_module(tmp_path):
    selection = ParameterSelection("bias")
    for seed in (0, 1):
        module = project(seed)
        fit(tmp_path, module, selection, max_steps=1)
        trained = {name for name, parameter in module.unet.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in module.unet.named_parameters() if name.endswith("bias")}
        assert all(parameter is module.unet.get_parameter(name) for name, parameter in selection._trained.items())


def test_a_compiled_denoiser_is_refused():
    for unet in (torch.compile(small_pixel_unet()), nn.Sequential(torch.compile(small_pixel_unet()))):
        with pytest.raises(ValueError, match="not compiled yet"):
            ParameterSelection("bias").apply(Project(unet))


@pytest.mark.parametrize("family", ["svdiff", "lora"])
def test_average_of_a_network_with_frozen_layers_follows(family):
    module = Averaging(small_pixel_unet(), "deepcopy")
    module.unet.mid_block.attentions[0].requires_grad_(False)
    ParameterSelection(family).apply(module)
    assert [name for name, _ in module.ema.named_parameters()] == [name for name, _ in module.unet.named_parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "svdif"}, "`family` expected one of"),
        ({"family": "bias", "mask": "012"}, "`mask` expected a string of 0 and 1, but got '012'"),
        ({"family": "norm", "granularity": "published"}, "`granularity` expected 'block' or 'attention'"),
        ({"family": "svdiff", "norm_lr_scale": 0.0}, "`norm_lr_scale` expected a number > 0, but got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ParameterSelection(**arguments)
