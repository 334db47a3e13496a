"""Data in shards, an averaging callback that records its shards, and the batches of one shard alone."""

import copy

import lightning.pytorch as pl

from lightning_iet import DigitsDataModule, ParameterAveragingCallback
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng

SEED = 7


def digits(num_train=24, batch_size=4, **kwargs):
    return DigitsDataModule(num_train, batch_size=batch_size, **kwargs)


class Spied(ParameterAveragingCallback):
    """Keeps the shard models of each epoch from just before and just after its last batch's averaging."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.after, self.optimizers = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        last = self.engine is not None and batch_idx == trainer.num_training_batches - 1
        if last:
            self.engine.park()
            self.before.append(self.shards())
            self.optimizers.append([copy.deepcopy(list(s.optimizers[0][0].values())) for s in self.states()])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if last:
            self.after.append(self.shards())

    def states(self):
        return self.engine.states.values()

    def shards(self):
        return [self.engine.layout.views(copy.deepcopy(state.flat)) for state in self.states()]


class ShardAlone:
    """A batch sampler: the batches of one shard, epoch after epoch."""

    def __init__(self, sampler, shard):
        self.sampler, self.shard, self.epoch = sampler, shard, -1

    def __iter__(self):
        self.epoch += 1
        return iter(self.sampler.batches(self.shard, self.epoch))

    def __len__(self):
        return self.sampler.steps


class Seeds(pl.Callback):
    """Seeds each step as the shard's own."""

    def __init__(self, shard):
        self.shard = shard

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seed_rng(derive_seed(SEED, self.shard, trainer.current_epoch, batch_idx))
