"""Whatever the trainer is told: a shard's model is the one that plain Lightning trains on that shard alone."""

from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lightning_iet import DiffusionModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data import ShardPlan
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.shards import Seeds, ShardAlone, Spied, digits
from tests.helpers.weights import assert_same_bits, state_of

SEED, SHARDS, EPOCHS = 7, 2, 2


class ByEpoch(DiffusionModule):
    """Its learning rate falls by epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.unet.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def by_epoch():
    return ByEpoch(smallest().unet, ema_decay=0.9)


class Alternating(pl.LightningModule):
    """Two networks with an optimizer each, stepped in turn by hand, as adversarial training does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.automatic_optimization = False
        self.a, self.b = torch.nn.Linear(64, 8), torch.nn.Linear(8, 64)

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        for optimizer in self.optimizers():
            loss = (self.b(self.a(images) + torch.randn(len(images), 8)) - images).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=0.1, momentum=0.9)


def train_alone(tmp_path, shard, module, settings, *, multiple_of=1):
    """The oracle: plain Lightning, one shard's batches, no callback of ours."""
    data = digits(20)
    data.setup("fit")
    sharded = ShardedDataModule(data, SHARDS, partition="iid")
    sharded.plan = ShardPlan(num_shards=SHARDS, seed=SEED, multiple_of=multiple_of)
    sampler = ShardAlone(sharded.train_dataloader().sampler, shard)
    loader = DataLoader(data.train_set, batch_sampler=sampler)
    trainer = quiet_trainer(
        tmp_path, **({"max_epochs": EPOCHS, "callbacks": [Seeds(shard)], "limit_val_batches": 0} | settings())
    )
    trainer.fit(module, loader, DataLoader(data.train_set))
    return module


def scaled():
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**18, growth_interval=2
    )  # overflows: the first steps are skipped
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def smallest(**kwargs):
    return tiny_diffusion(unet={"mid_block_type": None}, **kwargs)


@pytest.mark.parametrize(
    ("make", "settings", "multiple_of", "offload"),
    [
        (smallest, lambda: {"precision": "bf16-mixed"}, 1, "none"),
        (smallest, scaled, 1, "cpu"),
        (smallest, lambda: {"gradient_clip_val": 0.05}, 1, "none"),
        (smallest, lambda: {"accumulate_grad_batches": 2}, 2, "cpu"),
        (lambda: smallest(warmup_steps=4), dict, 1, "cpu"),
        (by_epoch, dict, 1, "none"),
        (Alternating, dict, 1, "none"),
        (Alternating, dict, 1, "cpu"),
    ],
    ids=["bf16", "fp16 with scaler", "clipping", "accumulation", "LR by step", "LR by epoch", "two optimizers", "away"],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step.*")
def test_each_shard_trains_as_it_would_alone(tmp_path, make, settings, multiple_of, offload):
    spied = Spied(SHARDS, every_n_epochs=EPOCHS, offload=offload)
    trainer = quiet_trainer(
        tmp_path, **({"max_epochs": EPOCHS, "callbacks": [spied], "limit_val_batches": 0} | settings())
    )
    module = make()
    torch.manual_seed(SEED)
    trainer.fit(module, ShardedDataModule(digits(20), SHARDS, partition="iid"))
    assert not torch.equal(*(shard[next(iter(shard))] for shard in spied.before[-1]))
    for shard in range(SHARDS):
        alone = dict(train_alone(tmp_path, shard, make(), settings, multiple_of=multiple_of).named_parameters())
        start = dict(make().named_parameters())
        assert any(not torch.equal(alone[name], start[name]) for name in alone)
        for name, weight in alone.items():
            assert torch.equal(spied.before[-1][shard][name], weight), (shard, name)


class Hoarding(Alternating):
    """Steps every third batch only: its shards, of two batches each, leave gradients behind."""

    def training_step(self, batch, batch_idx):
        loss = self.b(self.a(batch[0].flatten(1))).square().mean()
        self.found.append(all(p.grad is None for p in self.parameters()))
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


def test_gradients_that_a_shard_leaves_behind_do_not_reach_the_next(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ParameterAveragingCallback(2)], limit_val_batches=0)
    module = Hoarding()
    module.found = []
    trainer.fit(module, ShardedDataModule(digits(16), 2, partition="iid"))
    assert module.found == [True, False, True, True]


class SaveInValidation(pl.Callback):
    """Saves in the middle of a validation, and looks at what the model shows before and after."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        before = state_of(pl_module)
        trainer.save_checkpoint(self.path)
        self.seen.append((before, state_of(pl_module)))


def test_saving_does_not_hide_the_average_from_a_validation(tmp_path):
    saving = SaveInValidation(tmp_path / "saved.ckpt")
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 3, "max_epochs": 1}
    trainer = quiet_trainer(tmp_path, callbacks=[saving, ParameterAveragingCallback(2, every_n_epochs=9)], **settings)
    trainer.fit(tiny_diffusion(), ShardedDataModule(digits(20), 2, partition="iid"))
    assert len(saving.seen) == 2
    for before, after in saving.seen:
        assert_same_bits(before, after)


def logged_loss(tmp_path, accumulate):
    averaging = ParameterAveragingCallback(2)
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((averaging._log.sums[0, 0] / averaging._log.sums[1, 0]).tolist())

    module = tiny_diffusion()
    module.loss_reducer = lambda losses, timesteps: losses.mean() * 0 + 8
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[averaging, Look()], accumulate_grad_batches=accumulate
    )
    averaging.on_train_epoch_end = lambda *_: None
    trainer.fit(module, ShardedDataModule(digits(32), 2, partition="iid"))
    return seen


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_logged_loss_is_not_divided_by_the_accumulated_batches(tmp_path, accumulate):
    assert logged_loss(tmp_path, accumulate) == [[8.0, 8.0]]


# --- limits -----------------------------------------------------------------------------------------------------


def fit_limited(tmp_path, world_size, limit):
    torch.manual_seed(SEED)
    module = smallest()
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=1,
        callbacks=[ParameterAveragingCallback(4)],
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_train_batches=limit,
        limit_val_batches=0,
    )
    trainer.fit(module, ShardedDataModule(digits(52), 4, partition="iid"))
    return state_of(module)


def test_a_limited_epoch_is_the_same_on_any_number_of_processes(tmp_path, processes):
    (alone,) = processes(1).run(fit_limited, tmp_path, 1, 9)
    unlimited = fit_limited(tmp_path, 1, None)
    assert not torch.equal(alone["unet.conv_in.weight"], unlimited["unet.conv_in.weight"])
    for state in processes(2).run(fit_limited, tmp_path, 2, 9):
        assert_same_bits(state, alone)


class Slow(pl.Callback):
    """Makes the clock of a Timer run out after some steps, whatever the machine."""

    def __init__(self, steps):
        self.left = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
        timer._duration = 1e9 if self.left > 0 else 0.0


def test_max_time_ends_in_the_average_and_the_run_can_go_on(tmp_path):
    """Stopped by the clock in the middle of a shard, continued, it ends as if it had never been stopped."""

    def fit(*callbacks, ckpt_path=None, save=None, **kwargs):
        torch.manual_seed(SEED)
        module = smallest()
        averaging = Spied(2, every_n_epochs=3)
        trainer = quiet_trainer(
            tmp_path, callbacks=[*callbacks, averaging], max_epochs=3, limit_val_batches=0, **kwargs
        )
        data = ShardedDataModule(digits(20), 2, partition="iid")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, averaging

    expected, _ = fit()
    saving = SaveAtStep(tmp_path / "cut.ckpt", 8)
    stopped, _ = fit(Slow(8), saving, max_time=timedelta(days=1))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert saved["callbacks"]["Spied"]["done"] == [2, 0]  # in the second epoch, 3 steps of each shard in an epoch
    assert_same_bits(state_of(stopped), dict(saved["state_dict"]))
    resumed, _ = fit(ckpt_path=tmp_path / "cut.ckpt", max_time=timedelta(days=1))
    assert_same_bits(state_of(resumed), state_of(expected))


class SaveAtStep(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit_manual(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback(2)], devices=2, strategy="ddp")
    with pytest.raises(
        MisconfigurationException, match=r"expected automatic optimization.*Use automatic optimization, one"
    ):
        trainer.fit(Alternating(), ShardedDataModule(digits(20), 2, partition="iid"))


def fit_sync_batchnorm(tmp_path):
    trainer = quiet_trainer(
        tmp_path, callbacks=[ParameterAveragingCallback(2)], devices=2, strategy="ddp", sync_batchnorm=True
    )
    with pytest.raises(MisconfigurationException, match="expected sync_batchnorm=False, but got True"):
        trainer.fit(tiny_diffusion(), ShardedDataModule(digits(20), 2, partition="iid"))


@pytest.mark.parametrize("function", [fit_manual, fit_sync_batchnorm])
def test_what_cannot_work_on_processes_is_refused(tmp_path, processes, function):
    processes(2).run(function, tmp_path)


class ManualSchedule(Alternating):
    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return list(optimizers), [torch.optim.lr_scheduler.ExponentialLR(optimizers[1], 0.5)]


def test_schedules_that_a_module_steps_itself_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ParameterAveragingCallback(2)])
    with pytest.raises(
        MisconfigurationException, match="expected no LR schedules under manual optimization, but got 1"
    ):
        trainer.fit(ManualSchedule(), ShardedDataModule(digits(20), 2, partition="iid"))
