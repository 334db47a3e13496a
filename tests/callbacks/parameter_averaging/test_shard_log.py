import math

import lightning.pytorch as pl
import pytest
import torch

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.parameter_averaging.callback import diverges
from tests.helpers.interrupted import Saves
from tests.helpers.models import Memory, quiet_trainer, tiny_diffusion
from tests.helpers.shards import Spied, digits


class Losses(pl.Callback):
    """The oracle: a list of losses for each epoch and shard."""

    def __init__(self, num_shards):
        self.seen = []
        self.num_shards = num_shards

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([[] for _ in range(self.num_shards)])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        averaging = next(c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback))
        self.seen[-1][averaging.engine.active].append(float(outputs["loss"]))


def fit(tmp_path, world_size=1, spied=Spied, *, callbacks=(), ckpt_path=None, epochs=4):
    torch.manual_seed(1)
    memory, losses = Memory(), Losses(4)
    averaging = spied(4, every_n_epochs=2)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[averaging, *([] if ckpt_path else [losses]), *callbacks],
        logger=memory,
        max_epochs=epochs,
        limit_val_batches=0,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        log_every_n_steps=1,
        enable_checkpointing=bool(callbacks),
    )
    data = ShardedDataModule(digits(24), 4, partition="iid")
    trainer.fit(
        tiny_diffusion(unet={"mid_block_type": None}), data, ckpt_path=ckpt_path, weights_only=ckpt_path and True
    )
    logged = [epoch for epoch in memory.epochs if "shard_0/loss" in epoch]
    return logged, losses.seen, averaging


def test_losses_of_each_shard_are_the_means_of_its_steps(whole):
    logged, seen, *_ = whole
    assert len(logged) == 4
    for metrics, epoch in zip(logged, seen, strict=True):
        for shard, losses in enumerate(epoch):
            assert len(losses) == 2
            assert metrics[f"shard_{shard}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_distances_are_measured_from_the_average_at_each_averaging(whole):
    logged, _, spied, _ = whole
    assert ["shard_0/distance" in metrics for metrics in logged] == [False, True, False, True]
    for epoch in (1, 3):
        trained = [
            torch.cat([tensor.flatten() for name, tensor in shard.items() if name.startswith("unet.")]).double()
            for shard in spied.before[epoch]
        ]
        mean = sum(trained) / 4
        for shard, weights in enumerate(trained):
            expected = float((weights - mean).norm() / mean.norm())
            assert logged[epoch][f"shard_{shard}/distance"] == pytest.approx(expected, rel=1e-4)
            assert expected > 0


NAMES = ("1-3", "1-7", "1-end")  # of checkpoints: within an epoch, in its last step, and after its end


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *fit(folder, callbacks=[Saves(folder, NAMES)]), folder


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_logs_each_epoch_by_itself(tmp_path, whole, name):
    whole, *_, folder = whole
    resumed, *_ = fit(tmp_path, callbacks=[], ckpt_path=folder / f"{name}.ckpt", epochs=3)
    assert [metrics["epoch"] for metrics in resumed] == ([1, 2] if name == "1-3" else [2])
    for metrics in resumed:
        expected = whole[metrics["epoch"]]
        assert {k: v for k, v in metrics.items() if "shard_" in k} == pytest.approx(
            {k: v for k, v in expected.items() if "shard_" in k}, rel=1e-6
        )


def logs_of(tmp_path, world_size):
    return fit(tmp_path, world_size, spied=ParameterAveragingCallback, epochs=3)[0]


def test_processes_log_the_same(tmp_path, processes, whole):
    alone, *_ = whole
    together = processes(2).run(logs_of, tmp_path, 2)[0]
    for a, b in zip(alone[:3], together, strict=True):
        shard_values = {name for name in a if name.startswith("shard_")}
        assert shard_values == {name for name in b if name.startswith("shard_")}
        assert len(shard_values) >= 4
        for name in shard_values:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_skip_rates_of_shards_add_up_to_that_of_the_run(tmp_path):
    torch.manual_seed(1)
    memory = Memory()
    agc, averaging = AntiGradientControl(1.0, num_timesteps=1000), ParameterAveragingCallback(2)
    trainer = quiet_trainer(
        tmp_path, callbacks=[agc, averaging], logger=memory, max_epochs=3, limit_val_batches=0, log_every_n_steps=1
    )
    trainer.fit(tiny_diffusion(), ShardedDataModule(digits(24), 2, partition="iid"))
    logged = [epoch for epoch in memory.epochs if "shard_0/skip_rate" in epoch]
    assert len(logged) == 3
    for metrics in logged:
        rates = [metrics["shard_0/skip_rate"], metrics["shard_1/skip_rate"]]
        assert sum(rates) / 2 == pytest.approx(metrics["agc/skip_rate"], abs=1e-6)


def test_an_explosion_is_warned_of_once(tmp_path, caplog):
    class Explode(ParameterAveragingCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch >= 2 and self.engine.active == 1:
                pl_module.unet.conv_in.weight.data.add_(100.0)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    fit(tmp_path, spied=Explode)
    warnings = [record for record in caplog.records if "Shard models diverge" in record.getMessage()]
    assert len(warnings) == 1
    assert "epoch 4" in warnings[0].getMessage()
    caplog.clear()
    fit(tmp_path, epochs=2)
    assert "diverge" not in caplog.text


@pytest.mark.parametrize(
    ("distances", "expected"), [([0.1, 0.3], False), ([0.1, 1.01], True), ([0.1, math.inf], True), ([math.nan], True)]
)
def test_diverges(distances, expected):
    assert diverges(distances, reference=0.1) is expected
