"""A stranger's small module and loaders, shards of it, and the same trained alone on the batches of one shard."""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet import ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data import ShardPlan
from tests.helpers.models import quiet_trainer
from tests.helpers.shards import Seeds, ShardAlone

SEED, SHARDS, EPOCHS, DECAY = 7, 2, 4, 0.75


def numbers(size=21, width=3):
    return TensorDataset(torch.randn(size, width, generator=torch.Generator().manual_seed(0)))


def train_loader(**kwargs):
    return DataLoader(numbers(), **({"batch_size": 4, "shuffle": True} | kwargs))


def val_loader():
    return DataLoader(numbers(6), batch_size=3)


class Noisy(pl.LightningModule):
    """A stranger's module: draws noise in its step, and knows nothing of shards."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
            self.encoder = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 3)).requires_grad_(False)
            self.encoder.register_buffer("table", torch.randn(64))

    def training_step(self, batch, batch_idx):
        x = self.encoder(batch[0])
        return (self.net(x + torch.randn_like(x)) - x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def averages(self):
        return []


class Spied(ParameterAveragingCallback):
    """Keeps what each shard has just before every averaging, as named tensors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = []

    def _average(self, engine):
        engine.park()
        self.before.append([engine.layout.views(copy.deepcopy(state.flat)) for state in engine.states.values()])
        self.nbytes, self.names = engine.layout.nbytes, list(engine.layout.shapes)
        super()._average(engine)


def fit(tmp_path, module, *callbacks, data=None, world_size=1, every=EPOCHS, ckpt_path=None, **kwargs):
    torch.manual_seed(SEED)
    spied = Spied(SHARDS, every_n_epochs=every, offload=kwargs.pop("offload", "none"))
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[*callbacks, spied],
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        **({"max_epochs": EPOCHS, "limit_val_batches": 0} | kwargs),
    )
    data = data or ShardedDataModule.from_loader(train_loader(), val_loader(), num_shards=SHARDS)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return spied


def train_alone(tmp_path, module, shard, *callbacks, loader=None, epochs=EPOCHS):
    """The oracle: plain Lightning on the batches of one shard, with the seeds of that shard and no callback of ours."""
    loader = loader or train_loader()
    sharded = ShardedDataModule.from_loader(loader, num_shards=SHARDS)
    sharded.plan = ShardPlan(num_shards=SHARDS, seed=SEED)
    sampler = ShardAlone(sharded.train_dataloader().sampler, shard)
    trainer = quiet_trainer(
        tmp_path, max_epochs=epochs, callbacks=[Seeds(shard), *callbacks], limit_val_batches=0, num_sanity_val_steps=0
    )
    trainer.fit(module, DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn), val_loader())
    return module


def mean(tensors, sizes=(11, 10)):
    return sum(n * tensor.double() for n, tensor in zip(sizes, tensors, strict=True)) / sum(sizes)


class SaveAfter(pl.Callback):
    def __init__(self, path, steps, weights_only=False):
        self.path, self.steps, self.weights_only = path, steps, weights_only

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
