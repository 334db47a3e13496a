"""W = n · K processes: n replicas train one shard as ordinary DDP does, and shards are averaged across."""

from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.functional.sharding import hosted_shards, num_replicas
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

SEED = 3


class Regression(pl.LightningModule):
    """A module whose loss depends on its batch alone, so that a batch may be spread over processes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Numbers(pl.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        numbers = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return DataLoader(TensorDataset(numbers[:, :3], numbers[:, 3:]), batch_size=self.batch_size, shuffle=True)


class Counting(pl.Callback):
    """Counts the bytes of gradients that DDP reduces, and those of messages between processes."""

    def __init__(self):
        self.gradients = self.messages = 0

    def on_train_start(self, trainer, pl_module):
        def hook(_, bucket):
            self.gradients += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(trainer.strategy.model.process_group, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)


@contextmanager
def counted_messages(counting):
    original = dist.isend

    def isend(tensor, *args, **kwargs):
        counting.messages += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    dist.isend = isend
    try:
        yield
    finally:
        dist.isend = original


def fit(tmp_path, world_size, batch_size, num_shards=2, epochs=4, ckpt_path=None, save=None):
    torch.manual_seed(SEED)
    module, counting = Regression(), Counting()
    averaging = Kept(num_shards, every_n_epochs=2)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[averaging, *([counting] if world_size > 1 else []), *([Save(save)] if save else [])],
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=epochs,
    )
    with counted_messages(counting):
        data = ShardedDataModule(Numbers(batch_size), num_shards, partition="iid")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return {
        "model": state_of(module),
        "moments": averaging.moments,
        "gradients": counting.gradients,
        "messages": counting.messages,
        "flat": averaging.nbytes,
    }


class Save(pl.Callback):
    """Saves after the first epoch, in the middle of a round."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Kept(ParameterAveragingCallback):
    """Keeps the moments of every shard as a checkpoint would hold them."""

    moments = None

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        shards = self.state_dict()["shards"]
        self.nbytes = self.engine.layout.nbytes
        self.moments = {k: s["optimizers"][0]["state"][0]["exp_avg"].clone() for k, s in shards.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, _pools):
    from tests.helpers.distributed import Processes

    pool = _pools.setdefault(1, Processes(1)) if 1 not in _pools or not _pools[1].alive else _pools[1]
    (result,) = pool.run(fit, tmp_path_factory.mktemp("alone"), 1, 8)
    return result


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, _pools):
    """What is left on four processes, two for each shard; ``half.ckpt`` in their folder is of the middle of a round."""
    from tests.helpers.distributed import Processes

    pool = _pools.setdefault(4, Processes(4)) if 4 not in _pools or not _pools[4].alive else _pools[4]
    folder = tmp_path_factory.mktemp("replicated")
    return Results(pool.run(fit, folder, 4, 4, save=folder / "half.ckpt"), folder)


class Results(list):
    """By rank."""

    def __init__(self, results, folder):
        super().__init__(results)
        self.folder = folder


def test_replicas_equal_one_process_with_their_batches_together(alone, replicated):
    results = replicated
    for result in results:
        assert_same_bits(result["model"], results[0]["model"])
        for name, weight in result["model"].items():
            torch.testing.assert_close(weight, alone["model"][name], rtol=1e-5, atol=1e-6)
    for shard, moment in results[0]["moments"].items():
        torch.testing.assert_close(moment, alone["moments"][shard], rtol=1e-5, atol=1e-6)
    assert not torch.equal(alone["moments"][0], alone["moments"][1])


def test_no_gradient_crosses_shards_and_an_averaging_sends_what_an_all_reduce_would(tmp_path, processes):
    parameters = sum(p.numel() for p in Regression().parameters()) * 4
    steps = 4 * 4  # of 16 samples in batches of 4
    one_process_each = processes(2).run(fit, tmp_path, 2, 4)
    assert [result["gradients"] for result in one_process_each] == [0, 0]
    replicated = processes(4).run(fit, tmp_path, 4, 4)  # without a checkpoint, for which shards are sent as well
    # Half as many steps with two replicas: each takes half of a shard.
    assert [result["gradients"] for result in replicated] == [steps // 2 * parameters] * 4
    for results, shards in ((one_process_each, 2), (replicated, 2)):
        flat = results[0]["flat"]
        assert flat >= parameters
        # Two averagings; on average over the processes of a group.
        sent = sum(result["messages"] for result in results) / len(results)
        assert sent == 2 * 2 * flat * (shards - 1) / shards


def test_replicas_go_on_from_a_checkpoint(tmp_path, processes, replicated):
    whole, half = replicated[0], replicated.folder / "half.ckpt"
    # With half as many processes, each with a batch of twice the size, it is the same run to rounding.
    for result in processes(2).run(fit, tmp_path, 2, 8, ckpt_path=half):
        for name, weight in result["model"].items():
            torch.testing.assert_close(weight, whole["model"][name], rtol=1e-4, atol=1e-5)
    for result in processes(4).run(fit, tmp_path, 4, 4, ckpt_path=half):
        assert_same_bits(result["model"], whole["model"])


class Judged(Regression):
    """Gives its losses away; the timestep of a sample is a property of it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = (self.net(x) - y).square().mean(1)
        timesteps = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}


class Adapted(Judged):
    """Reduces its losses by an attribute."""

    def __init__(self):
        super().__init__()
        self.loss_reducer = lambda losses, timesteps: losses.mean()

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return self.loss_reducer(outputs["sample_loss"], outputs["timesteps"])


def fit_with_agc(tmp_path, world_size, batch_size, kind):
    torch.manual_seed(SEED)
    module, agc = kind(), AntiGradientControl(0.9, num_timesteps=4)
    averaging = Banks(2, every_n_epochs=2)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[agc, averaging],
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=4,
    )
    trainer.fit(module, ShardedDataModule(Numbers(batch_size), 2, partition="iid"))
    return {"model": state_of(module), "banks": averaging.banks, "skip_rate": agc.skip_rate()}


class Banks(ParameterAveragingCallback):
    banks = None

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.banks = {k: s["callbacks"][0]["bank"].clone() for k, s in self.state_dict()["shards"].items()}


@pytest.mark.parametrize("kind", [Judged, Adapted])
def test_replicas_are_judged_as_one_batch(tmp_path, processes, kind):
    """AGC leaves out what it would leave out of their batches together, and each sample counts alike."""
    alone = fit_with_agc(tmp_path, 1, 8, kind)
    assert 0.1 < alone["skip_rate"] < 0.9
    for result in processes(4).run(fit_with_agc, tmp_path, 4, 4, kind):
        assert result["skip_rate"] == pytest.approx(alone["skip_rate"])
        for name, weight in result["model"].items():
            torch.testing.assert_close(weight, alone["model"][name], rtol=1e-5, atol=1e-6)
        for shard, bank in result["banks"].items():
            torch.testing.assert_close(bank, alone["banks"][shard], rtol=1e-5, atol=1e-6)


def noises(tmp_path):
    """What each process draws in its first step."""
    torch.manual_seed(SEED)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.random.fork_rng(devices=[]):
                seen.append(torch.rand(()).item())

    trainer = quiet_trainer(
        tmp_path, callbacks=[ParameterAveragingCallback(2), Look()], devices=4, strategy="ddp", max_epochs=1
    )
    trainer.fit(Regression(), ShardedDataModule(Numbers(4), 2, partition="iid"))
    return seen


def test_every_replica_draws_noise_of_its_own(tmp_path, processes):
    seen = processes(4).run(noises, tmp_path)
    assert len({numbers[0] for numbers in seen}) == 4


def first_weights(tmp_path):
    """What each process trains first, when each has drawn weights of its own."""
    module = Regression()
    trainer = quiet_trainer(
        tmp_path, callbacks=[ParameterAveragingCallback(2), look := Look()], devices=4, strategy="ddp", max_epochs=1
    )
    for parameter in module.parameters():
        parameter.data.add_(trainer.global_rank)
    trainer.fit(module, ShardedDataModule(Numbers(4), 2, partition="iid"))
    return look.first


class Look(pl.Callback):
    first = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.first = self.first or state_of(pl_module)


def test_all_shards_start_from_the_weights_of_the_first_process(tmp_path, processes):
    for state in processes(4).run(first_weights, tmp_path):
        assert_same_bits(state, state_of(Regression()))


@pytest.mark.parametrize(("shards", "processes_", "expected"), [(4, 1, 1), (4, 4, 1), (4, 8, 2), (1, 3, 3)])
def test_number_of_replicas(shards, processes_, expected):
    assert num_replicas(shards, processes_) == expected
    hosts = [shard for rank in range(processes_) for shard in hosted_shards(shards, processes_, rank)]
    assert sorted(hosts) == sorted(list(range(shards)) * expected)


@pytest.mark.parametrize(("shards", "processes_"), [(4, 3), (3, 2), (2, 5)])
def test_numbers_that_do_not_divide_are_refused(shards, processes_):
    with pytest.raises(ValueError, match=f"divisor of the {processes_} processes, but got {shards}"):
        num_replicas(shards, processes_)


def test_a_module_of_ours_trains_with_replicas(tmp_path, processes):
    results = processes(4).run(fit_diffusion, tmp_path)
    for state in results:
        assert_same_bits(state, results[0])


def fit_diffusion(tmp_path):
    torch.manual_seed(SEED)
    from tests.helpers.shards import digits

    module = tiny_diffusion(unet={"dropout": 0.1, "mid_block_type": None})
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[ParameterAveragingCallback(2)],
        devices=4,
        strategy="ddp",
        max_epochs=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ShardedDataModule(digits(24), 2, partition="iid"))
    return state_of(module)
