import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data import IndexedImages, ShardPlan
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.shards import Spied, digits
from tests.helpers.weights import assert_same_bits, state_of

SEED = 7


def fit(tmp_path, *, num_shards=4, callbacks=(), data=None, module=None, sharded=True, round_length=None, **kwargs):
    """Train shards in this process; returns the module and the averaging callback."""
    torch.manual_seed(SEED)
    module = module or tiny_diffusion()
    data = data or digits()
    averaging = Spied(num_shards, **(round_length or {"every_n_epochs": 2}))
    trainer = quiet_trainer(tmp_path, callbacks=[*callbacks, averaging], **({"limit_val_batches": 0} | kwargs))
    # The partition is iid: with four images of a class, four shards cannot each have one of all ten.
    data = ShardedDataModule(data, num_shards, partition="iid") if sharded else data
    trainer.fit(module, data)
    return module, averaging


def averaging_of(trainer):
    return next(c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback))


def train_alone(shard, epochs, num_shards=4, num_train=24, batch_size=4):
    """The oracle: a bare loop that trains one model on one shard's batches, with the seeds of that shard."""
    module = tiny_diffusion().train()
    data = digits(num_train, batch_size)
    data.setup("fit")
    sharded = ShardedDataModule(data, num_shards, partition="iid")
    sharded.plan = ShardPlan(num_shards=num_shards, seed=SEED)
    sampler = sharded.train_dataloader().sampler
    optimizer = torch.optim.Adam(module.unet.parameters(), lr=2e-4)
    for epoch in range(epochs):
        for step, indices in enumerate(sampler.batches(shard, epoch)):
            images = torch.stack([data.train_set[i][0] for i in indices])
            seed_rng(derive_seed(SEED, shard, epoch, step))
            timesteps = torch.randint(1000, (len(images),))
            loss = module.losses(images, timesteps, torch.randn_like(images)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, weight in zip(module.ema.module.parameters(), module.unet.parameters(), strict=True):
                    average.lerp_(weight, 1 - 0.9)
    return module


@pytest.fixture(scope="module")
def four_epochs(tmp_path_factory):
    """The module and the callback after two rounds of two epochs."""
    return fit(tmp_path_factory.mktemp("four"), max_epochs=4)


def test_each_shard_before_averaging_equals_a_model_trained_alone_on_it(four_epochs):
    _, spy = four_epochs
    for shard in range(4):
        alone = dict(train_alone(shard, epochs=2).named_parameters())
        for name, weight in alone.items():
            assert torch.equal(spy.before[1][shard][name], weight), (shard, name)


def test_shards_differ_before_the_averaging_and_are_its_weighted_mean_after(tmp_path):
    module, spy = fit(tmp_path, num_shards=4, data=digits(26), max_epochs=2)
    sizes = [7, 7, 6, 6]
    for name, weight in module.named_parameters():
        shards = [tensors[name] for tensors in spy.before[1]]
        expected = sum(n * x.double() for n, x in zip(sizes, shards, strict=True)) / 26
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)
        for after in spy.after[1]:
            assert torch.equal(after[name], weight)
    assert not torch.equal(spy.before[1][0]["unet.conv_in.weight"], spy.before[1][1]["unet.conv_in.weight"])
    # In mid-round nothing is averaged.
    assert not torch.equal(spy.after[0][0]["unet.conv_in.weight"], spy.after[0][1]["unet.conv_in.weight"])


def test_optimizer_moments_are_kept_by_each_shard(four_epochs):
    _, spy = four_epochs
    moments = [state[0]["exp_avg"] for state in spy.optimizers[3]]
    assert not torch.equal(moments[0], moments[1])
    # 2 steps of each shard in each of 4 epochs: no reset at the averagings after epochs 2 and 4.
    assert {float(state[0]["step"]) for state in spy.optimizers[3]} == {8.0}


def test_one_shard_and_threshold_zero_are_plain_training_bit_for_bit(tmp_path):
    torch.manual_seed(SEED)
    plain = tiny_diffusion()
    quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=1).fit(plain, digits(16))
    settings = {"num_shards": 1, "data": digits(16), "max_epochs": 2, "limit_val_batches": 1}
    neutral, _ = fit(tmp_path, callbacks=[AntiGradientControl(0.0)], **settings)
    assert_same_bits(state_of(plain), state_of(neutral))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path, monkeypatch):
    first, again = (state_of(fit(tmp_path, max_epochs=1)[0]) for _ in range(2))
    assert_same_bits(first, again)
    monkeypatch.setattr("tests.callbacks.parameter_averaging.test_callback.SEED", SEED + 1)
    other = state_of(fit(tmp_path, max_epochs=1)[0])
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


class Watch(pl.Callback):
    """Keeps the weights that validation sees."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(state_of(pl_module))


def test_validation_in_mid_round_sees_the_average_and_changes_nothing(tmp_path):
    watch = Watch()
    watched, spy = fit(
        tmp_path,
        callbacks=[watch],
        max_epochs=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        val_check_interval=3,
    )
    assert len(watch.seen) == 4  # after batches 3 and 6 of 8, in two epochs
    shards = [tensors["unet.conv_in.weight"] for tensors in spy.before[0]]
    assert not any(torch.equal(watch.seen[0]["unet.conv_in.weight"], shard) for shard in shards)
    unwatched, _ = fit(tmp_path, max_epochs=2)
    assert_same_bits(state_of(watched), state_of(unwatched))


def test_the_result_is_the_average_also_when_the_last_round_is_cut_short(tmp_path):
    module, spy = fit(tmp_path, max_epochs=3)
    shards = [tensors["unet.conv_in.weight"].double() for tensors in spy.before[2]]
    torch.testing.assert_close(module.unet.conv_in.weight.detach().double(), sum(shards) / 4, rtol=1e-6, atol=1e-7)


def test_rounds_can_be_counted_in_steps_of_a_shard(tmp_path):
    averaged = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if averaging_of(trainer).engine.agreed:
                averaged.append((trainer.current_epoch, batch_idx))

    averaging = ParameterAveragingCallback(2, every_n_train_steps=3)
    trainer = quiet_trainer(tmp_path, callbacks=[averaging, Count()], max_epochs=3, limit_val_batches=0)
    trainer.fit(tiny_diffusion(), ShardedDataModule(digits(16), 2, partition="iid"))
    # 2 steps of each of 2 shards in an epoch: step 3 is each shard's first of epoch 1, step 6 its last of epoch 2.
    assert averaged == [(1, 1), (2, 3)]


def test_the_model_is_ordinary_afterwards(tmp_path):
    module, averaging = fit(tmp_path, max_epochs=1)
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert len(storages) == len(list(module.parameters()))
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in module.parameters())
    assert averaging.engine is None
    assert "on_save_checkpoint" not in vars(module)
    copy.deepcopy(module)


def test_an_exception_leaves_an_ordinary_model(tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop")

    module = tiny_diffusion()
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, module=module, callbacks=[Fail()])
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in module.parameters())


def test_frozen_parameters_are_shared_and_unchanged(tmp_path):
    module = tiny_diffusion()
    module.unet.conv_in.requires_grad_(False)
    before, address = module.unet.conv_in.weight.clone(), module.unet.conv_in.weight.data_ptr()
    fit(tmp_path, module=module, max_epochs=1)
    assert torch.equal(module.unet.conv_in.weight, before)
    assert module.unet.conv_in.weight.data_ptr() == address


class Normalised(pl.LightningModule):
    """A stranger's module with float and integer buffers, and a schedule by epoch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Numbers(pl.LightningDataModule):
    def train_dataloader(self):
        data = TensorDataset(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        return DataLoader(data, batch_size=4, shuffle=True)


def test_buffers_are_averaged_integers_survive_and_schedules_by_epoch_are_kept_apart(tmp_path):
    module, spy = fit(tmp_path, num_shards=2, module=Normalised(), data=Numbers(), max_epochs=2)
    means = [tensors["net.1.running_mean"].double() for tensors in spy.before[1]]
    assert not torch.equal(*means)
    torch.testing.assert_close(module.net[1].running_mean.double(), sum(means) / 2, rtol=1e-6, atol=1e-7)
    assert module.net[1].num_batches_tracked.item() == 4  # 2 steps of one shard in each of 2 epochs
    assert module.rates == [1.0] * 4 + [0.5] * 4


def test_accumulated_gradients_never_straddle_two_shards(tmp_path):
    _, spy = fit(tmp_path, num_shards=2, data=digits(20), max_epochs=1, accumulate_grad_batches=2)
    # 10 samples in batches of 4 are 3 batches, rounded up to 4: two optimizer steps for each shard.
    assert {float(state[0]["step"]) for state in spy.optimizers[0]} == {2.0}


def test_limit_train_batches_is_shared_out_among_the_shards(tmp_path):
    _, spy = fit(tmp_path, max_epochs=1, limit_train_batches=4)
    assert {float(state[0]["step"]) for state in spy.optimizers[0]} == {1.0}


def test_fast_dev_run_takes_one_step(tmp_path):
    module, _ = fit(tmp_path, fast_dev_run=True)
    assert module.ema.n_averaged.item() == 1
    assert not torch.equal(module.unet.conv_in.weight, tiny_diffusion().unet.conv_in.weight)


class Counting(Normalised):
    """Puts new tensors in the place of its buffers, as careless modules do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.seen = self.seen + len(batch[0])
        self.steps = self.steps + 1
        return super().training_step(batch, batch_idx)


def test_buffers_that_a_module_replaces_stay_with_their_shard(tmp_path):
    module, spied = fit(tmp_path, num_shards=2, module=Counting(), data=Numbers(), max_epochs=2)
    assert [tensors["seen"].item() for tensors in spied.before[1]] == [16.0, 16.0]
    assert (module.seen.item(), module.steps.item()) == (16.0, 4)


def test_a_second_fit_starts_all_shards_alike(tmp_path):
    agc = AntiGradientControl(0.5)
    fit(tmp_path, callbacks=[agc], max_epochs=1)
    banks, addresses = [], []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            states = averaging_of(trainer).engine.states.values()
            addresses.extend(state.callbacks[0]["bank"].data_ptr() for state in states)
            banks.extend(state.callbacks[0]["bank"].clone() for state in states)

    fit(tmp_path, callbacks=[agc, Look()], max_epochs=1)
    assert banks[0].any()
    assert all(torch.equal(bank, banks[0]) for bank in banks[1:])
    assert len(set(addresses)) == 4


@pytest.mark.filterwarnings("ignore:.*was called without a model.*", "ignore:.*no last checkpoint.*")
def test_a_checkpoint_on_an_exception_holds_the_shards_and_their_average(tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop")

    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, callbacks=[Fail(), saving], enable_checkpointing=True)
    checkpoint = torch.load(saving.ckpt_path, weights_only=True)
    saved = checkpoint["callbacks"]["Spied"]
    assert saved["done"] == [2, 2, 2, 0]
    flats = [shard["flat"]["float32"].double() for shard in saved["shards"].values()]
    weight = checkpoint["state_dict"]["unet.conv_in.weight"].flatten().double()
    torch.testing.assert_close(weight, (sum(flats) / 4)[: len(weight)], rtol=1e-5, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_shards": 0}, "`num_shards` expected an integer ≥ 1, but got 0"),
        ({"every_n_epochs": 0}, "`every_n_epochs` expected an integer ≥ 1"),
        ({"every_n_train_steps": -1}, "`every_n_train_steps` expected an integer ≥ 1"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "expected one of them, but got both"),
        ({"weighting": "loss"}, "`weighting` expected one of 'samples', 'uniform', but got 'loss'"),
        ({"offload": "gpu"}, "`offload` expected one of 'auto', 'none', 'cpu', 'disk', but got 'gpu'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ParameterAveragingCallback(**kwargs)


@pytest.mark.parametrize("name", ["num_shards", "every_n_epochs", "every_n_train_steps"])
@pytest.mark.parametrize("value", [2.5, "2"])
def test_numbers_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match=f"^Argument `{name}` expected an integer, but got {value!r}.$"):
        ParameterAveragingCallback(**{name: value})


def plateau(module):
    def configure():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss"}}

    module.configure_optimizers = configure


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (plateau, {}, "expected LR schedules that step by themselves, but got ReduceLROnPlateau"),
        (None, {"max_steps": 3, "max_epochs": None}, "expected max_steps=-1, but got 3"),
        (
            None,
            {"limit_train_batches": 2},
            "to leave a step to each of the 4 shards, at least 4, but got 2",
        ),
        (None, {"callbacks": [StochasticWeightAveraging(0.1)]}, "that mixes the weights.* of shards, but got Stoch"),
        (None, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, "but got GradientAccumulationScheduler"),
        (
            None,
            {"accumulate_grad_batches": 2, "round_length": {"every_n_train_steps": 3}},
            r"a multiple of accumulate_grad_batches \(2\), but got 3",
        ),
        (None, {"overfit_batches": 1}, "expected overfit_batches=0"),
        (None, {"limit_train_batches": 0.5}, "expected limit_train_batches as a number of batches"),
        (None, {"sharded": False}, r"Wrap the data module: ShardedDataModule\(datamodule, num_shards=4\)"),
        (None, {"data": digits(20), "num_shards": 25}, r"at most one shard per sample \(20\), but got 25"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, change, kwargs, message):
    module = tiny_diffusion()
    if change is not None:
        change(module)
    before = state_of(module)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, module=module, **kwargs)
    assert_same_bits(before, state_of(module))


def test_sharded_data_without_averaging_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Add ParameterAveragingCallback\(num_shards=4\)"):
        quiet_trainer(tmp_path).fit(tiny_diffusion(), ShardedDataModule(digits(), 4, partition="iid"))


def test_data_and_averaging_must_agree_on_the_number_of_shards(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback(2)])
    with pytest.raises(MisconfigurationException, match=r"expected the same value.*but got 4 and 2"):
        trainer.fit(tiny_diffusion(), ShardedDataModule(digits(), 4))


# --- several processes ------------------------------------------------------------------------------------------------


def fit_on_processes(tmp_path, world_size, num_shards=4, num_train=26):
    """Final weights on this process; four shards with a schedule, AGC, and validation in mid-round."""
    torch.manual_seed(SEED)
    module = tiny_diffusion(warmup_steps=3, unet={"dropout": 0.1, "mid_block_type": None})
    averaging = ParameterAveragingCallback(num_shards, every_n_epochs=2)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[AntiGradientControl(0.5), averaging],
        max_epochs=3,
        limit_val_batches=1,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
    )
    trainer.fit(module, ShardedDataModule(digits(num_train), num_shards, partition="iid"))
    return state_of(module)


def test_the_number_of_processes_does_not_change_a_bit(tmp_path, processes):
    (alone,) = processes(1).run(fit_on_processes, tmp_path, 1)
    for state in processes(4).run(fit_on_processes, tmp_path, 4):  # fewer: see test_resume.py
        # Counters are each shard's own; equal here, since all shards take the same number of steps.
        assert_same_bits(alone, state)


class Stranger(pl.LightningModule):
    """Somebody's module: a bare loss, and data of its own on each process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = torch.nn.Linear(3, 1)
        self.before = self.after = None

    def train_dataloader(self):
        rank = self.trainer.global_rank
        data = torch.randn(10 + 4 * rank, 3, generator=torch.Generator().manual_seed(rank))
        return DataLoader(TensorDataset(data), batch_size=4)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ends(ParameterAveragingCallback):
    """Keeps the weights from just before and just after the averaging."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.before = state_of(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        pl_module.after = state_of(pl_module)


def fit_stranger(tmp_path, world_size):
    module = Stranger()
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[Ends()],
        max_epochs=1,
        devices=world_size,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    return module.before, module.after


def train_stranger_alone(rank):
    """The oracle: three batches (as many as the smallest shard has), no other process in sight."""
    module = Stranger()
    data = torch.randn(10 + 4 * rank, 3, generator=torch.Generator().manual_seed(rank))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for start in (0, 4, 8):
        loss = (module.net(data[start : start + 4]) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.state_dict()


def test_in_a_strangers_module_no_gradient_crosses_and_uneven_data_do_not_hang(tmp_path, processes):
    results = processes(2).run(fit_stranger, tmp_path, 2)
    alone = [train_stranger_alone(rank) for rank in range(2)]
    for rank, (before, after) in enumerate(results):
        for name, weight in before.items():
            torch.testing.assert_close(weight, alone[rank][name], rtol=1e-6, atol=1e-7)
            expected = (10 * alone[0][name].double() + 14 * alone[1][name].double()) / 24
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(results[0][0]["net.weight"], results[1][0]["net.weight"])
    assert_same_bits(results[0][1], results[1][1])


def fit_with_global_sampler(tmp_path):
    module = Stranger()
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback()], devices=2, strategy="ddp")
    with pytest.raises(MisconfigurationException, match="but got a DistributedSampler"):
        trainer.fit(module)


def fit_three_shards(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback(3)], devices=2, strategy="ddp")
    with pytest.raises(ValueError, match="multiple or a divisor of the 2 processes, but got 3"):
        trainer.fit(tiny_diffusion(), ShardedDataModule(digits(), 3, partition="iid"))


def fit_static_graph(tmp_path):
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[ParameterAveragingCallback(2)],
        devices=2,
        strategy=pl.strategies.DDPStrategy(static_graph=True),
    )
    with pytest.raises(MisconfigurationException, match="static_graph"):
        trainer.fit(tiny_diffusion(), ShardedDataModule(digits(), 2, partition="iid"))


def fit_different_data(tmp_path):
    """One process has been started with another batch size."""
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback(2)], devices=2, strategy="ddp")
    data = digits(24, batch_size=4 if trainer.global_rank == 0 else 2)
    message = (
        "All processes expected the same steps of each shard in an epoch, but got 3 on process 0 and 6 on process 1"
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(tiny_diffusion(), ShardedDataModule(data, 2, partition="iid"))


def fit_and_fail(tmp_path):
    """An exception; a callback that would then save cannot: the shards of the others may be lost."""

    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("stop")

    saving = OnExceptionCheckpoint(tmp_path)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[ParameterAveragingCallback(2), Fail(), saving],
        devices=2,
        strategy="ddp",
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(tiny_diffusion(), ShardedDataModule(digits(), 2, partition="iid"))
    assert list(tmp_path.glob("*.ckpt")) == []
    assert "save_checkpoint" not in vars(trainer)


@pytest.mark.parametrize(
    "function", [fit_with_global_sampler, fit_three_shards, fit_static_graph, fit_different_data, fit_and_fail]
)
def test_what_cannot_work_on_processes_is_refused(tmp_path, processes, function):
    processes(2).run(function, tmp_path)


def test_indexed_images_yield_their_index():
    data = IndexedImages(torch.zeros(2, 1, 2, 2), torch.tensor([4, 5]))
    assert [(int(label), index) for _, label, index in (data[0], data[1])] == [(4, 0), (5, 1)]
