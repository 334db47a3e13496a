"""Shards in somebody else's project: averages of weights in every form, frozen networks, both Lightnings."""

import copy
import importlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_iet import ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data import ShardPlan
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng
from tests.helpers.own_projects import (
    DECAY,
    EPOCHS,
    SEED,
    SHARDS,
    Noisy,
    SaveAfter,
    fit,
    mean,
    numbers,
    train_alone,
    train_loader,
    val_loader,
)
from tests.helpers.weights import assert_same_bits, state_of

# --- averages of weights, each in the form of some project ------------------------------------------------------------


class ShadowList:
    """As torch-ema keeps it: a list of tensors, updated in place, with a decay that grows with the updates."""

    def __init__(self, parameters):
        self.shadow_params = [p.clone().detach() for p in parameters]
        self.num_updates = 0
        self.backup = None

    @torch.no_grad()
    def update(self, parameters):
        self.num_updates += 1
        decay = min(DECAY, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            shadow.sub_((1.0 - decay) * (shadow - parameter))


class InShadowList(Noisy):
    def __init__(self):
        super().__init__()
        self.ema = ShadowList(self.net.parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ema.update(self.net.parameters())

    def averages(self):
        return self.ema.shadow_params


class InShadowDict(Noisy):
    """A dict by name, on the module itself, whose tensors are replaced at each update."""

    def __init__(self):
        super().__init__()
        self.shadow = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        for name, tensor in self.net.state_dict().items():
            self.shadow[name] = DECAY * self.shadow[name] + (1 - DECAY) * tensor

    def averages(self):
        return list(self.shadow.values())


class InDeepCopy(Noisy):
    """A frozen deep copy, and a number of updates that starts it late."""

    def __init__(self):
        super().__init__()
        self.ema_model = copy.deepcopy(self.net).requires_grad_(False)
        self.updates = 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.updates += 1
        decay = DECAY if self.updates > 4 else 0.0
        for average, weight in zip(self.ema_model.parameters(), self.net.parameters(), strict=True):
            average.data.mul_(decay).add_(weight.data, alpha=1 - decay)

    def averages(self):
        return list(self.ema_model.parameters())


class Wrapper(nn.Module):
    """As lucidrains' ema-pytorch: the copy in a module with counters as buffers, the original hidden in a list."""

    def __init__(self, net):
        super().__init__()
        self.online_model = [net]
        self.ema_model = copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("step", torch.tensor(0))

    @torch.no_grad()
    def update(self):
        self.step += 1
        for average, weight in zip(self.ema_model.parameters(), self.online_model[0].parameters(), strict=True):
            average.lerp_(weight, 1 / float(self.step + 1))


class InWrapper(Noisy):
    def __init__(self):
        super().__init__()
        self.ema = Wrapper(self.net)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ema.update()

    def averages(self):
        return list(self.ema.ema_model.parameters())


class Hidden:
    """As YOLO's ModelEMA: a deep copy that no module registers, in an object that counts."""

    def __init__(self, net):
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.updates = 0

    def update(self, net):
        self.updates += 1
        for average, weight in zip(self.ema.state_dict().values(), net.state_dict().values(), strict=True):
            average.lerp_(weight, 1 / (self.updates + 2))


class InHiddenCopy(Noisy):
    def __init__(self):
        super().__init__()
        self.keeper = Hidden(self.net)

    def on_before_zero_grad(self, optimizer):
        self.keeper.update(self.net)

    def averages(self):
        return list(self.keeper.ema.parameters())


class InBuffers(Noisy):
    """As LDM's LitEma: a buffer for each weight, and one for the number of updates."""

    def __init__(self):
        super().__init__()
        self.ema = nn.Module()
        self.ema.register_buffer("num_updates", torch.tensor(0))
        for name, parameter in self.net.named_parameters():
            self.ema.register_buffer(name.replace(".", ""), parameter.detach().clone())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ema.num_updates += 1
        for name, parameter in self.net.named_parameters():
            average = self.ema.get_buffer(name.replace(".", ""))
            average.sub_((average - parameter.detach()) / (self.ema.num_updates + 1))

    def averages(self):
        return [buffer for name, buffer in self.ema.named_buffers() if name != "num_updates"]


class InAveragedModel(Noisy):
    def __init__(self):
        super().__init__()
        self.ema = AveragedModel(self.net, avg_fn=get_ema_avg_fn(DECAY))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ema.update_parameters(self.net)

    def averages(self):
        return list(self.ema.module.parameters())


FORMS = [InShadowList, InShadowDict, InDeepCopy, InWrapper, InHiddenCopy, InBuffers, InAveragedModel]


@pytest.mark.parametrize(
    ("form", "offload"),
    [*((form, "none") for form in FORMS), *((form, "cpu") for form in (InShadowDict, InHiddenCopy, InBuffers))],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_averages_in_a_module_are_each_shards_and_averaged(tmp_path, form, offload):
    module = form()
    spied = fit(tmp_path, module, offload=offload)
    alone = [train_alone(tmp_path, form(), shard) for shard in range(SHARDS)]
    averages = [[tensor.detach().clone() for tensor in one.averages()] for one in alone]
    assert len(averages[0]) == 4
    for shard in range(SHARDS):
        found = list(spied.before[-1][shard].values())
        for tensor in (*averages[shard], *alone[shard].net.parameters()):
            assert sum(tensor.shape == other.shape and torch.equal(tensor, other) for other in found) == 1
    for result, *shards in zip(module.averages(), *averages, strict=True):
        assert not torch.equal(*shards)
        torch.testing.assert_close(result.double(), mean(shards), rtol=1e-6, atol=1e-7)
    for name, result in module.net.named_parameters():
        shards = [one.net.get_parameter(name).detach() for one in alone]
        torch.testing.assert_close(result.detach().double(), mean(shards), rtol=1e-6, atol=1e-7)


def fit_form(tmp_path, form, world_size):
    """Averages and weights of the finished model, with averagings between."""
    module = form()
    fit(tmp_path, module, world_size=world_size, every=2, max_epochs=3)
    return state_of(module), [tensor.detach().clone() for tensor in module.averages()]


@pytest.mark.parametrize("form", [InShadowList, InHiddenCopy], ids=lambda form: form.__name__)
def test_the_number_of_processes_changes_no_average(tmp_path, processes, form):
    ((alone, averages),) = processes(1).run(fit_form, tmp_path, form, 1)
    for state, others in processes(2).run(fit_form, tmp_path, form, 2):
        assert_same_bits(state, alone)
        assert all(torch.equal(a, b) for a, b in zip(averages, others, strict=True))


@pytest.mark.parametrize("form", [InShadowDict, InDeepCopy, InWrapper], ids=lambda form: form.__name__)
def test_a_cut_run_goes_on_with_the_averages_of_its_shards(tmp_path, form):
    path = tmp_path / "cut.ckpt"
    whole, resumed = form(), form()
    fit(tmp_path, whole, SaveAfter(path, 10), every=3)  # in the second epoch, 3 steps of each shard in an epoch
    fit(tmp_path, resumed, every=3, ckpt_path=path)
    assert_same_bits(state_of(resumed), state_of(whole))
    assert all(torch.equal(a, b) for a, b in zip(resumed.averages(), whole.averages(), strict=True))


def test_the_module_is_ordinary_afterwards_and_trains_again(tmp_path):
    for form in FORMS:
        module = form()
        for _ in range(2):
            fit(tmp_path, module, max_epochs=1)
        assert "on_train_batch_end" not in vars(module)
        for tensor in (*module.averages(), *module.parameters()):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        copy.deepcopy(module)


# --- Lightning's own averages -----------------------------------------------------------------------------------------


class Looking(pl.Callback):
    """Keeps the weights that validation sees; behind Lightning's callback."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(state_of(pl_module))


KINDS = {
    "ema": lambda: EMAWeightAveraging(decay=DECAY),
    "every second step, from the third": lambda: EMAWeightAveraging(
        decay=DECAY, update_every_n_steps=2, update_starting_at_step=3
    ),
    "swa": WeightAveraging,
    "by epoch": lambda: EMAWeightAveraging(decay=DECAY, update_starting_at_step=1000, update_starting_at_epoch=1),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_averages_of_lightnings_callback_are_each_shards_and_averaged(tmp_path, kind):
    module = Noisy()
    spied = fit(tmp_path, module, KINDS[kind]())
    alone = [train_alone(tmp_path, Noisy(), shard, KINDS[kind]()) for shard in range(SHARDS)]
    for name, result in module.net.named_parameters():
        shards = [one.net.get_parameter(name).detach() for one in alone]  # Lightning leaves the average in the module
        for shard, tensor in enumerate(shards):
            (found,) = (t for n, t in spied.before[-1][shard].items() if n.endswith(f"Averaging.net.{name}"))
            assert torch.equal(found, tensor)
        assert not torch.equal(*shards)
        torch.testing.assert_close(result.detach().double(), mean(shards), rtol=1e-6, atol=1e-7)


def test_validation_shows_the_average_of_the_averages_and_changes_nothing(tmp_path):
    looking = Looking()
    watched, unwatched = Noisy(), Noisy()
    spied = fit(tmp_path, watched, EMAWeightAveraging(decay=DECAY), looking, limit_val_batches=1, every=3)
    fit(tmp_path, unwatched, EMAWeightAveraging(decay=DECAY), every=3)
    assert_same_bits(state_of(watched), state_of(unwatched))
    shards = [next(t for n, t in one.items() if n.endswith("Averaging.net.0.weight")) for one in spied.before[0]]
    # The sanity check, then epochs 1, 2 and 3, behind which the shards were averaged.
    torch.testing.assert_close(looking.seen[3]["net.0.weight"].double(), mean(shards), rtol=1e-6, atol=1e-7)
    in_mid_round = looking.seen[1]["net.0.weight"]
    one_epoch = [train_alone(tmp_path, Noisy(), s, EMAWeightAveraging(decay=DECAY), epochs=1) for s in range(SHARDS)]
    expected = mean([one.net[0].weight.detach() for one in one_epoch])
    torch.testing.assert_close(in_mid_round.double(), expected, rtol=1e-6, atol=1e-7)


def test_checkpoints_hold_the_average_of_the_averages_and_the_run_goes_on(tmp_path):
    path = tmp_path / "cut.ckpt"
    whole, resumed = Noisy(), Noisy()
    kind = KINDS["every second step, from the third"]
    fit(tmp_path, whole, kind(), SaveAfter(path, 10), every=3)
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["callbacks"]["Spied"]["shards"]
    assert [int(shard["callbacks"][0]["steps"]) for shard in saved.values()] == [6, 4]
    assert not torch.equal(checkpoint["state_dict"]["net.0.weight"], checkpoint["current_model_state"]["net.0.weight"])
    for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        flats = [shard["flat"]["float32"] for shard in saved.values()]
        weight = state["net.0.weight"]
        expected = [mean([flat[start : start + 12] for flat in flats]) for start in range(len(flats[0]) - 11)]
        assert any(torch.allclose(weight.flatten().double(), tensor, rtol=1e-6, atol=1e-8) for tensor in expected)
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    fit(tmp_path, resumed, kind(), every=3, ckpt_path=path)
    assert_same_bits(state_of(resumed), state_of(whole))


def fit_ema(tmp_path, world_size):
    module = Noisy()
    fit(tmp_path, module, KINDS["every second step, from the third"](), world_size=world_size, every=2, max_epochs=3)
    return state_of(module)


def test_the_number_of_processes_changes_no_average_of_lightnings(tmp_path, processes):
    (alone,) = processes(1).run(fit_ema, tmp_path, 1)
    for state in processes(2).run(fit_ema, tmp_path, 2):
        assert_same_bits(state, alone)


def test_two_of_lightnings_averages_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="expected at most one WeightAveraging callback, but got 2"):
        fit(tmp_path, Noisy(), EMAWeightAveraging(), WeightAveraging())


# --- frozen networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Noisy, InDeepCopy], ids=lambda form: form.__name__)
def test_frozen_networks_are_neither_averaged_nor_multiplied(tmp_path, form):
    module = form()
    frozen = {name: t for name, t in module.state_dict(keep_vars=True).items() if name.startswith("encoder")}
    before = {name: (t.detach().clone(), t.data_ptr()) for name, t in frozen.items()}
    spied = fit(tmp_path, module)
    assert len(before) == 5
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in before:
            assert torch.equal(tensor, before[name][0])
            assert tensor.data_ptr() == before[name][1]
    assert not any(name.startswith("encoder") for name in spied.names)
    # What a shard holds of its own are the four tensors of the network, each rounded up to 64 bytes, and their average.
    assert spied.nbytes == (64 + 64 + 64 + 64) * (2 if form is InDeepCopy else 1)


class Drifting(Noisy):
    """Changes a frozen layer all the same."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.encoder[0].weight.data.mul_(1.001)


class DriftingLate(Noisy):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 3:  # the last step of the first shard's turn
            self.encoder.table.add_(1)


@pytest.mark.parametrize(
    ("form", "name", "steps"), [(Drifting, "encoder.0.weight", 1), (DriftingLate, "encoder.table", 3)]
)
def test_frozen_tensors_that_change_are_refused_before_another_shard_starts_from_them(tmp_path, form, name, steps):
    module = form()
    taken = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            taken.append(trainer.global_step)

    with pytest.raises(MisconfigurationException, match=f"got changes of 1, '{name}' the first: shards would share"):
        fit(tmp_path, module, Count())
    assert taken[-1] == steps


def test_layers_that_resemble_trained_ones_are_no_copies(tmp_path):
    class HalfFrozen(Noisy):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.net[0].requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return self.net[1](self.net[0](batch[0])).square().mean()

    spied = fit(tmp_path, HalfFrozen())
    assert spied.names == ["net.1.weight", "net.1.bias"]


# --- loaders of a stranger, trained on --------------------------------------------------------------------------------


class Counted(IterableDataset):
    """A stream of dicts that tells its length."""

    def __len__(self):
        return len(numbers())

    def __iter__(self):
        return ({"x": x} for (x,) in numbers())


class OfDicts(Noisy):
    """Looks at dicts, and at the index that was added to them."""

    def training_step(self, batch, batch_idx):
        return super().training_step([batch["x"]], batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


LOADERS = {
    "weights": (Noisy, lambda: train_loader(shuffle=None, sampler=WeightedRandomSampler([1.0, 2, 3] * 7, 16))),
    "one by one": (Noisy, lambda: train_loader(batch_size=None)),
    "stream": (OfDicts, lambda: DataLoader(Counted(), batch_size=4)),
}


@pytest.mark.parametrize("kind", list(LOADERS))
def test_each_shard_trains_as_it_would_alone_on_its_part_of_any_loader(tmp_path, kind):
    form, loader = LOADERS[kind]
    data = ShardedDataModule.from_loader(loader(), val_loader(), num_shards=SHARDS)
    spied = fit(tmp_path, form(), data=data)
    for shard in range(SHARDS):
        sharded = ShardedDataModule.from_loader(loader(), num_shards=SHARDS)
        sharded.plan = ShardPlan(num_shards=SHARDS, seed=SEED)
        sampler = sharded.train_dataloader().sampler
        module = form()
        optimizer = module.configure_optimizers()
        for epoch in range(EPOCHS):
            for step, indices in enumerate(sampler.batches(shard, epoch)):
                x = torch.stack([numbers()[i][0] for i in indices])
                x = x[0] if kind == "one by one" else x
                seed_rng(derive_seed(SEED, shard, epoch, step))
                loss = module.training_step({"x": x} if form is OfDicts else [x], 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, weight in module.net.named_parameters():
            assert torch.equal(spied.before[-1][shard][f"net.{name}"], weight), (shard, name)


def test_a_stream_without_a_length_takes_a_limit(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return (torch.full((3,), float(i)) for i in range(10**9))

    read = []

    class Reading(Noisy):
        def training_step(self, batch, batch_idx):
            read.append(batch[:, 0].tolist())
            return self.net(batch).square().mean()

    data = ShardedDataModule.from_loader(DataLoader(Endless(), batch_size=2), val_loader(), num_shards=SHARDS)
    fit(tmp_path, Reading(), data=data, max_epochs=1, limit_train_batches=5)
    assert read == [[0, 2], [4, 6], [1, 3], [5, 7]]
    data = ShardedDataModule.from_loader(DataLoader(Endless(), batch_size=2), val_loader(), num_shards=SHARDS)
    with pytest.raises(ValueError, match="Give it to ShardedDataModule, or set limit_train_batches to a number"):
        fit(tmp_path, Reading(), data=data)


# --- import pytorch_lightning -----------------------------------------------------------------------------------------


def fit_with(package, tmp_path, callback, form, world_size=1):
    """A project on the LightningModule of either package; returns its weights."""
    pytest.importorskip(package)
    lightning = importlib.import_module(package)
    kept = {name: value for name, value in {**vars(Noisy), **vars(form)}.items() if name.endswith(("step", "s", "end"))}
    project = type("Project", (lightning.LightningModule,), kept)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    module, like = project(), form()
    for name in ("net", "encoder", "ema"):
        if hasattr(like, name):
            setattr(module, name, getattr(like, name))
    callbacks = importlib.import_module(f"{package}.callbacks")
    averaging = ParameterAveragingCallback(SHARDS, every_n_epochs=2)
    trainer = lightning.Trainer(
        callbacks=[averaging, *([getattr(callbacks, callback)(decay=DECAY)] if callback else [])],
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        default_root_dir=tmp_path,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(SEED)
    trainer.fit(module, ShardedDataModule(Data(), num_shards=SHARDS))
    assert trainer.callback_metrics["val/loss"] > 0
    return state_of(module), trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize(("callback", "form"), [(None, InShadowList), ("EMAWeightAveraging", Noisy)])
def test_both_lightnings_give_the_same_bits(tmp_path, callback, form):
    ours, theirs = (
        fit_with(package, tmp_path / package, callback, form) for package in ("lightning.pytorch", "pytorch_lightning")
    )
    assert_same_bits(ours[0], theirs[0])
    saved, other = (torch.load(path, weights_only=True) for _, path in (ours, theirs))
    assert_same_bits(dict(saved["state_dict"]), dict(other["state_dict"]))


def weights_with(package, tmp_path, world_size):
    return fit_with(package, tmp_path, "EMAWeightAveraging", Noisy, world_size)[0]


def test_the_other_lightning_gives_the_same_bits_on_processes(tmp_path, processes):
    (alone,) = processes(1).run(weights_with, "lightning.pytorch", tmp_path / "1", 1)
    for state in processes(2).run(weights_with, "pytorch_lightning", tmp_path / "2", 2):
        assert_same_bits(state, alone)


@pytest.mark.parametrize(
    ("name", "arguments"), [("StochasticWeightAveraging", [0.1]), ("GradientAccumulationScheduler", [{0: 2}])]
)
def test_callbacks_of_both_lightnings_are_refused(tmp_path, name, arguments):
    package = pytest.importorskip("pytorch_lightning")
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    project = type(
        "Project", (package.LightningModule,), {n: vars(Noisy)[n] for n in ("training_step", "configure_optimizers")}
    )
    module = project()
    module.net, module.encoder = Noisy().net, Noisy().encoder
    trainer = package.Trainer(
        callbacks=[ParameterAveragingCallback(SHARDS), getattr(callbacks, name)(*arguments)],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_epochs=1,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match=f"but got {name}"):
        trainer.fit(module, ShardedDataModule.from_loader(train_loader(), num_shards=SHARDS))
