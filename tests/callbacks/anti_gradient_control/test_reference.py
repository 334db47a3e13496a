"""Anchored AGC against the same written by hand: a loop over steps, shards and samples."""

import copy
import math
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_iet import AntiGradientControl, DigitsDataModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.evaluation import Evaluation
from lightning_iet.data import ImageDataModule, IndexedImages
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import partition
from lightning_iet.utilities.random import isolated_rng, seed_rng
from tests.helpers.devices import CountWaits
from tests.helpers.evaluations import FewDigits
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

SEED, BINS, TIMESTEPS, THRESHOLD, DECAY, EVERY = 5, 4, 8, 0.9, 0.5, 2


class Net(nn.Module):
    """A denoiser f(x, t) with all that must stay as it is: dropout, and the statistics of a batch norm."""

    def __init__(self, dropout=0.25):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.inner, self.outer = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t):
        return self.outer(self.dropout(torch.tanh(self.inner(self.norm(x))))) * (1 + t[:, None] / TIMESTEPS)


class Dict(pl.LightningModule):
    """Returns its losses per sample."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = Net()
        self.record = [].append  # a function: what changes in the module itself would be found

    @property
    def calls(self):
        """Whether each call was in training, with gradients on, and on how many images."""
        return self.record.__self__

    def predict(self, batch):
        (x,) = batch
        t = torch.randint(TIMESTEPS, (len(x),))
        noise = torch.randn_like(x)
        self.record((self.training, torch.is_grad_enabled(), len(x)))
        self.log("loud", x.sum())
        return self.net(x + t[:, None] / TIMESTEPS * noise, t), noise, t

    def losses(self, batch):
        prediction, noise, t = self.predict(batch)
        return (prediction - noise).square().mean(1), t

    def training_step(self, batch, batch_idx):
        losses, t = self.losses(batch)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": t}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""


class Reducer(Dict):
    """Reduces them by an attribute."""

    def __init__(self):
        super().__init__()
        self.loss_reducer = lambda losses, t: losses.mean()

    def training_step(self, batch):
        return self.loss_reducer(*self.losses(batch))


class Hooks(Dict):
    """Knows nothing of AGC."""

    def training_step(self, batch, batch_idx):
        prediction, noise, _ = self.predict(batch)
        return F.mse_loss(prediction, noise)


KINDS = [Dict, Reducer, Hooks]


def numbers(num, seed=0):
    return TensorDataset(torch.randn(num, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def loader(num, seed=0, batch_size=4, **kwargs):
    return DataLoader(numbers(num, seed), batch_size=batch_size, **kwargs)


def make(threshold=THRESHOLD, reference="held_out", **kwargs):
    settings = {"num_timesteps": TIMESTEPS, "num_bins": BINS, "decay": DECAY}
    settings |= {"reference_every": EVERY, "reference_images": 5}
    agc = AntiGradientControl(threshold, reference=reference, **(settings | kwargs))
    agc.load_shard_state(agc.shard_state() | {"bank": agc.bank.double()})
    return agc


class SameNoise(pl.Callback):
    """What a step draws depends on its place alone."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def fit(tmp_path, module, *callbacks, train=None, val=None, seed=SEED, ckpt_path=None, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"max_epochs": 2, "limit_val_batches": 0} | kwargs
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    loaders = loader(22) if train is None else train, loader(7, seed=1) if val is None else val
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class ByHand:
    """One shard's model, optimizer and bank."""

    def __init__(self, module, normalize="batch"):
        self.module, self.optimizer = module, module.configure_optimizers()
        module.log = lambda *args: None
        self.bank, self.steps, self.skipped, self.normalize = [0.0] * BINS, 0, 0, normalize

    def step(self, batch, unseen, *, shard=0, size=None):
        losses, t = self.module.losses(batch)
        bins = [int(step) * BINS // TIMESTEPS for step in t]
        kept = [loss for loss, place in zip(losses, bins, strict=True) if loss >= THRESHOLD * self.bank[place]]
        self.skipped += len(losses) - len(kept)
        divisor = len(losses) if self.normalize == "batch" else max(1, len(kept))
        self.optimizer.zero_grad()
        (sum(kept, start=0 * losses.sum()) / divisor).backward()
        self.steps += 1
        if self.steps % EVERY == 1:
            self.look_at(unseen, shard, size or len(losses))
        self.optimizer.step()

    def look_at(self, unseen, shard, size):
        with isolated_rng(seed=derive_seed(SEED, shard, self.steps, 0, 1)), torch.no_grad():
            self.module.eval()
            batch = [torch.stack([unseen[i] for i in torch.randint(len(unseen), (size,)).tolist()])]
            losses, t = self.module.losses(batch)
            self.module.train()
        values = [[] for _ in range(BINS)]
        for loss, step in zip(losses.tolist(), t.tolist(), strict=True):
            values[step * BINS // TIMESTEPS].append(loss)
        for place, found in enumerate(values):
            if found:
                share = DECAY ** len(found)
                self.bank[place] = share * self.bank[place] + (1 - share) * sum(found) / len(found)


# --- equal to a loop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "normalize", "size"), [(Dict, "kept", None), (Reducer, "batch", 3), (Hooks, None, 6)])
def test_held_out_equals_agc_by_hand(tmp_path, kind, normalize, size):
    module, agc = kind(), make(normalize=normalize, reference_batch_size=size)
    by_hand = ByHand(Dict(), normalize or "batch")
    indices = {}
    agc.on_train_end = lambda *args: indices.update(taken=agc.unseen_images.indices.tolist())
    fit(tmp_path, module, agc, SameNoise())
    unseen = [numbers(7, seed=1)[i][0] for i in indices["taken"]]
    assert len(set(indices["taken"])) == 5
    for epoch in range(2):
        for batch_idx, batch in enumerate(list(loader(22))):
            torch.manual_seed(100 * epoch + batch_idx)
            by_hand.step(batch, unseen, size=size)
    assert_close(dict(module.net.named_parameters()), dict(by_hand.module.net.named_parameters()), rtol=1e-9, atol=1e-9)
    assert_close(agc.bank.tolist(), by_hand.bank, rtol=1e-9, atol=1e-9)
    assert agc.run_statistics.skipped.sum() == by_hand.skipped > 5
    assert agc.run_statistics.unseen.sum() == 6 * (size or 4)
    assert agc.run_statistics.seen.sum() == 44


@pytest.mark.parametrize("reference", ["held_out", "other_shards"])
def test_shards_equal_agc_by_hand(tmp_path, reference):
    agc, train = make(reference=reference), numbers(21)
    module, averaging = Dict(), ParameterAveragingCallback(3, every_n_epochs=2)
    data = ShardedDataModule.from_loader(
        DataLoader(train, batch_size=4, shuffle=True), loader(5, seed=1), num_shards=3, partition="iid"
    )
    torch.manual_seed(SEED)
    quiet_trainer(tmp_path, callbacks=[agc, averaging], max_epochs=4, limit_val_batches=0).fit(module, data)

    shards = partition(21, 3, seed=0)
    models = [ByHand(Dict()) for _ in range(3)]
    held_out = [numbers(5, seed=1)[i][0] for i in torch.randperm(5, generator=torch.Generator().manual_seed(0))]
    for epoch in range(4):
        for k, model in enumerate(models):
            others = [train[i][0] for other in range(3) if other != k for i in shards[other].tolist()]
            order = torch.randperm(7, generator=torch.Generator().manual_seed(derive_seed(SEED, k, epoch)))
            for step, part in enumerate(torch.tensor_split(shards[k][order], 2)):
                seed_rng(derive_seed(SEED, k, epoch, step))
                model.step(train[part], others if reference == "other_shards" else held_out, shard=k)
        if epoch % 2:
            average(models)
    assert_close(dict(module.named_parameters()), dict(models[0].module.named_parameters()), rtol=1e-9, atol=1e-9)
    assert_close(agc.bank.tolist(), models[2].bank, rtol=1e-9, atol=1e-9)  # of the shard that came last
    assert agc.run_statistics.skipped.sum() == sum(model.skipped for model in models) > 3


def average(models):
    """All go on from the mean of their weights and statistics."""
    states = [model.module.state_dict() for model in models]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    for model in models:
        model.module.load_state_dict(mean)


def learn_together(rank_losses, rank_timesteps):
    """What two replicas of one shard learn from unseen images of their own."""
    torch.distributed.init_process_group("gloo")
    agc = make()
    agc.replicas = torch.distributed.group.WORLD
    agc.bins.continuous = False
    rank = torch.distributed.get_rank()
    agc.learn_reference(rank_losses[rank], rank_timesteps[rank])
    divisor = agc.select(torch.tensor([0.4, 0.6, 0.7]), torch.tensor([0, 1, 2])).divisor
    return agc.bank, agc.epoch_statistics.unseen.sum(), divisor


def test_replicas_learn_from_all_their_unseen_images(processes):
    losses, timesteps = torch.rand(2, 6, dtype=torch.float64), torch.randint(TIMESTEPS, (2, 6))
    alone = make()
    alone.bins.continuous = False
    alone.learn_reference(losses.T.flatten(), timesteps.T.flatten())
    for bank, unseen, divisor in processes(2).run(learn_together, losses, timesteps):
        assert_close(bank, alone.bank, rtol=1e-12, atol=1e-12)
        assert unseen == 6  # statistics are added up over processes later
        assert divisor == 3  # of its own batch: DDP takes the mean of the gradients


def test_no_step_waits_for_the_device(tmp_path):
    def waits(steps, *callbacks):
        with CountWaits() as counted:
            fit(tmp_path, Dict(), *callbacks, limit_train_batches=steps, max_epochs=1)
        return counted.count

    assert waits(5, make(reference_every=1)) - waits(3, make(reference_every=1)) == waits(5) - waits(3)
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        agc = AntiGradientControl(0.9, reference="held_out")
        agc.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda"))), Dict(), "fit")
        agc._is_first_batch = False
        agc.learn_reference(torch.rand(8, device="cuda"), torch.randint(1000, (8,)))
        assert agc.select(torch.rand(8, device="cuda"), torch.randint(1000, (8,), device="cuda")).divisor == 8
        assert agc.bank.device.type == "cuda"


# --- training takes the course that it would have taken --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_zero_is_plain_training_bit_for_bit(tmp_path, kind):
    module, plain, agc = kind(), kind(), make(0)
    fit(tmp_path, module, agc)
    fit(tmp_path, plain)
    assert_same_bits(state_of(module), state_of(plain))  # weights, and statistics of the batch norm
    assert agc.run_statistics.unseen.sum() == 24
    assert agc.run_statistics.skipped.sum() == 0
    looks = [(training, grad) for training, grad, _ in module.calls if not training]
    assert looks == [(False, kind is Hooks)] * 6  # hooks tell losses by their graph, through which nothing flows
    assert len(module.calls) - len(looks) == len(plain.calls) == 12
    assert vars(module).keys() == vars(plain).keys()


def test_threshold_zero_leaves_shards_and_ema_alone(tmp_path):
    def states(reference):
        averaging = ParameterAveragingCallback(2, every_n_epochs=2)
        agc = AntiGradientControl(0, reference=reference, reference_every=1)
        module = tiny_diffusion(unet={"dropout": 0.1})
        torch.manual_seed(SEED)
        trainer = quiet_trainer(tmp_path, callbacks=[agc, averaging], max_epochs=2, limit_val_batches=0)
        trainer.fit(module, ShardedDataModule(DigitsDataModule(20, batch_size=5), 2))
        assert agc.run_statistics.unseen.sum() == (0 if reference == "train" else 40)
        return state_of(module)

    plain = states("train")
    for reference in ("held_out", "other_shards"):
        assert_same_bits(states(reference), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_images_cause_no_gradient(tmp_path, kind):
    counted = {"backward": 0, "of parameters": 0}

    class Watch(pl.Callback):
        """Behind AGC: whatever it has done to gradients is done."""

        def on_before_backward(self, trainer, pl_module, loss):
            counted["backward"] += 1

        def on_after_backward(self, trainer, pl_module):
            gradients = [parameter.grad for parameter in pl_module.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(gradients, self.before, strict=True))

    class Before(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            watch.before = [parameter.grad.clone() for parameter in pl_module.parameters()]

    module, watch = kind(), Watch()
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: counted.update({"of parameters": counted["of parameters"] + 1}))
    fit(tmp_path, module, Before(), make(reference_every=1), watch)
    num_parameters = len(list(module.parameters()))
    assert counted == {"backward": 12, "of parameters": 12 * num_parameters}
    assert sum(not training for training, _, _ in module.calls) == 12


def run(folder, world_size=1, *, reference="other_shards", ckpt_path=None, save_at=()):
    """Train shards; what is left of them."""
    torch.manual_seed(SEED)
    module = tiny_diffusion(unet={"dropout": 0.1})
    averaging, agc = Kept(2, every_n_epochs=2), AntiGradientControl(0.9, reference=reference, reference_every=2)
    trainer = quiet_trainer(
        folder,
        callbacks=[agc, averaging, *(Save(folder / f"{step}.ckpt", step) for step in save_at)],
        max_epochs=3,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*yielded None.*")
        data = ShardedDataModule(DigitsDataModule(22, batch_size=4), 2, partition="iid")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    banks = {k: shard["callbacks"][0]["bank"] for k, shard in averaging.final.items()}
    gaps = agc.gap_history.rows
    return {"model": state_of(module), "banks": banks, "gaps": gaps, "unseen": int(agc.run_statistics.unseen.sum())}


class Kept(ParameterAveragingCallback):
    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.final = copy.deepcopy(self.state_dict()["shards"])


class Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.step is None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("reference", ["held_out", "other_shards"])
def test_processes_and_cuts_change_nothing(tmp_path, processes, reference):
    # Of 18 steps: the last one of the first epoch, and in the middle of the second.
    whole = run(tmp_path, reference=reference, save_at=(6, 8))
    assert whole["unseen"] > 20
    assert all((bank > 0).any() for bank in whole["banks"].values())
    two = tmp_path / "two"
    if reference == "held_out":
        settings = {"reference": reference}
        others = [processes(2).run(run, two, 2, **settings, ckpt_path=cut)[0] for cut in (None, tmp_path / "8.ckpt")]
    else:  # from two on to one within the second epoch, which has three steps of each process
        first, _ = processes(2).run(run, two, 2, ckpt_path=tmp_path / "6.ckpt", save_at=(8,))
        others = [first, run(tmp_path, ckpt_path=two / "8.ckpt")]
    for other in others:  # statistics of epochs are those of all processes after a cut
        assert_same_bits(other["model"], whole["model"])
        assert_same_bits(other["banks"], whole["banks"])
        assert other["unseen"] == whole["unseen"]
        assert_close(other["gaps"], whole["gaps"], equal_nan=True)


def test_one_shard_goes_on_where_it_was_cut(tmp_path):
    whole, module, other, again = Dict(), Dict(), make(), make()
    fit(tmp_path, whole, other, SameNoise(), Save(tmp_path / "cut.ckpt", None))
    with pytest.raises(ValueError, match="Argument `reference` expected 'held_out', with which the checkpoint"):
        fit(tmp_path, module, make(reference="train"), ckpt_path=tmp_path / "cut.ckpt")
    fit(tmp_path, module, again, SameNoise(), seed=99, ckpt_path=tmp_path / "cut.ckpt")  # the seed is the checkpoint's
    assert_same_bits(state_of(module), state_of(whole))
    assert torch.equal(again.bank, other.bank)
    assert torch.equal(again.gap_history.rows, other.gap_history.rows)


# --- what images there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "taken"), [(16, None), (1, 1), (5000, 5000)])
def test_few_and_many_images(tmp_path, num, taken):
    agc = make(reference_images=taken)
    fit(tmp_path, Dict(), agc, val=loader(num, seed=1), max_epochs=1)
    assert agc.run_statistics.unseen.sum() == 4 + 4 + 4
    assert agc.bank.max() > 0


def test_sixteen_images_of_all_classes_by_default(tmp_path):
    class ByClass(pl.LightningDataModule):
        """In stored order, as folders are."""

        def setup(self, stage):
            self.digits = DigitsDataModule(20, batch_size=5)
            self.digits.setup(stage)
            labels = self.digits.control_set.targets
            self.control_set = Subset(self.digits.control_set, labels.argsort(stable=True).tolist())

        def train_dataloader(self):
            return self.digits.train_dataloader()

        def val_dataloader(self):
            return DataLoader(self.control_set, batch_size=5)

    found = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            images = agc.unseen_images
            found["classes"] = {images.dataset[i][1] for i in images.indices.tolist()}
            found["number"] = len(images.indices)
            found["others"] = len(images.others())

    agc = AntiGradientControl(0.9, reference="held_out")
    quiet_trainer(tmp_path, callbacks=[agc, Look()], max_epochs=1, limit_val_batches=0).fit(tiny_diffusion(), ByClass())
    assert {int(label) for label in found["classes"]} == set(range(10))
    assert (found["number"], found["others"]) == (16, 512 - 16)
    assert agc.unseen_images is None


@pytest.mark.parametrize("shards", [1, 2])
def test_an_anchor_set_comes_first(tmp_path, shards):
    class Anchored(DigitsDataModule):
        def setup(self, stage):
            super().setup(stage)
            self.anchor_set = Subset(self.reference_set, range(3))

    found = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.update(dataset=agc.unseen_images.dataset, number=len(agc.unseen_images.indices))

    data = Anchored(20, batch_size=5)
    agc = AntiGradientControl(0.9, reference="held_out", reference_every=1)
    averaging = ParameterAveragingCallback(shards)
    wrapped = data if shards == 1 else ShardedDataModule(data, shards)
    trainer = quiet_trainer(tmp_path, callbacks=[agc, averaging, Look()], max_epochs=1, limit_val_batches=0)
    trainer.fit(tiny_diffusion(), wrapped)
    assert found == {"dataset": data.anchor_set, "number": 3}
    assert agc.run_statistics.unseen.sum() == 20


class Repetitive(ImageDataModule):
    """40 different images, the first ten of which occur three times."""

    def load(self):
        images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return IndexedImages(torch.cat([images, images[:10], images[:10]]))


@pytest.mark.parametrize("options", [{"synthetic": True, "image_size": 8}, {"duplicates": "drop", "num_control": 20}])
@pytest.mark.parametrize("asked", [64, 3])
def test_of_a_set_that_is_smaller_than_asked_for_half_is_left(tmp_path, options, asked):
    found = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.update(taken=len(agc.unseen_images.indices), others=len(agc.unseen_images.others()))

    data = Repetitive(channels=1, batch_size=8, **options)
    agc = AntiGradientControl(0.9, reference="held_out", reference_images=asked)
    trainer = quiet_trainer(tmp_path, callbacks=[agc, Look()], max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_diffusion(), data)
    length = len(data.control_set)
    assert length < 20
    assert found == {"taken": min(asked, length // 2), "others": length - min(asked, length // 2)}


class Images(pl.LightningModule):
    """Draws noise."""

    num_timesteps = 10

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        losses = (self.net(x) - torch.randn_like(x)).square().mean(1)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": torch.randint(10, (len(x),))}

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample(self, num, *, seed, start, **kwargs):
        return torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed + start))


@pytest.mark.usefixtures("drawn")
def test_the_evaluation_has_a_control_without_them_and_a_picture_is_drawn(tmp_path):
    evaluation = Evaluation(50, num_inference_steps=2, k=5)  # more than there are control images
    agc = AntiGradientControl(0.9, reference="held_out", num_timesteps=10, reference_every=1)
    trainer = quiet_trainer(
        tmp_path, callbacks=[agc, evaluation], logger=CSVLogger(tmp_path, name="", version=""), limit_val_batches=0
    )
    trainer.fit(Images(), FewDigits(20, num_control=60, batch_size=5))
    assert evaluation.report["control"]["num_images"] == 60 - 16
    assert evaluation.report["run"]["reference"] == "held_out"
    assert -1 < evaluation.report["run"]["gap"] < 1
    assert len(evaluation.report["curves"]["unseen_loss_by_timestep"]) == 10
    assert (tmp_path / "gap.png").stat().st_size > 10_000
    columns = (tmp_path / "metrics.csv").read_text().partition("\n")[0].split(",")
    for name in ("training_loss", "unseen_loss", "skip_rate"):
        assert any(column.startswith(f"agc/{name}/bin_") for column in columns)
    assert {"agc/gap", "agc/skip_rate"} <= set(columns)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_is_measured_against_the_same_control_as_at_the_end_of_training(tmp_path, shards):
    class Tested(Images):
        test_step = Images.validation_step

    def parts():
        """A new run of the same settings."""
        digits = FewDigits(20, num_control=60, batch_size=5)
        agc = AntiGradientControl(0.9, reference="held_out", num_timesteps=10, reference_images=20)
        evaluation = Evaluation(50, num_inference_steps=2, k=5, pictures=False)
        callbacks = [agc, evaluation, ParameterAveragingCallback(shards)]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, limit_val_batches=1, limit_test_batches=1)
        return trainer, callbacks[1], digits if shards == 1 else ShardedDataModule(digits, shards)

    module = Tested()
    trainer, evaluation, data = parts()
    trainer.fit(module, data)
    control = evaluation.report["control"]
    assert control["num_images"] == 60 - 20
    for command in ("validate", "test"):
        trainer, evaluation, data = parts()
        getattr(trainer, command)(module, data, verbose=False)
        assert evaluation.report["control"] == control


def test_continuous_times_teach_no_bins(tmp_path):
    class Continuous(Dict):
        def losses(self, batch):
            losses, t = super().losses(batch)
            return losses, (t + 0.5) / TIMESTEPS + (0 if self.training else 100.0)

    agc = make(reference_every=1)
    fit(tmp_path, Continuous(), agc)
    assert agc.bins.edges.max() < 1
    assert agc.run_statistics.unseen[:-1].sum() == 0  # all of them lie beyond the last edge


# --- refused, before the first optimizer step ------------------------------------------------------------------------


class Manual(Dict):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Counts(Dict):
    def training_step(self, batch, batch_idx):
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return super().training_step(batch, batch_idx)


class CountsInTraining(Dict):
    def training_step(self, batch, batch_idx):
        self.num_steps = getattr(self, "num_steps", 0) + self.training
        return super().training_step(batch, batch_idx)


class OwnGenerator(Dict):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        torch.rand(1, generator=self.generator)
        return super().training_step(batch, batch_idx)


class Silent(Reducer):
    def training_step(self, batch):
        losses, t = self.losses(batch)
        return self.loss_reducer(losses, t) if self.training else losses.mean()


class Compiled(Hooks):
    def __init__(self):
        super().__init__()
        self.compiled = torch.compile(lambda a, b: ((a - b) ** 2).mean(), backend="aot_eager")

    def training_step(self, batch, batch_idx):
        prediction, noise, _ = self.predict(batch)
        return self.compiled(prediction, noise)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(numbers(7))


REFUSED = {
    "manual optimization": (Manual, {}, r"Manual.training_step .* it takes optimizer steps itself"),
    "a counter": (Counts, {}, r"it changed `num_steps`. Let it do so where `self.training` is False"),
    "a generator": (OwnGenerator, {}, r"it changed `generator`"),
    "no losses": (Silent, {}, "it showed no losses"),
    "a compiled loss": (Compiled, {}, "its losses are measured by gradients, of which unseen images have none. Name"),
    "another size": (Dict, {"val": DataLoader(TensorDataset(torch.rand(7, 3)))}, "it raised RuntimeError: "),
    "another structure": (Dict, {"val": DataLoader([{"x": 1.0}] * 7)}, "it raised TypeError: "),
    "too few": (
        Dict,
        {"val": loader(4)},
        "`reference_images` expected at most the 4 images of the validation set, but",
    ),
    "a stream": (Dict, {"val": DataLoader(Stream())}, "expected a map-style validation set .* but got Stream"),
    "no loader": (Dict, {"val": []}, "expected a validation DataLoader for 'held_out', but got none. Give one to fit"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("name", "threshold"), [*((name, 0.9) for name in REFUSED), ("a counter", 0), ("no losses", 0)]
)
def test_refused(tmp_path, name, threshold):
    kind, kwargs, message = REFUSED[name]
    module = kind()
    before = copy.deepcopy(dict(module.named_parameters()))
    with pytest.raises(ValueError, match=message) as refusal:
        fit(tmp_path, module, make(threshold), **kwargs)
    assert "\n" not in str(refusal.value)
    assert_same_bits(dict(module.named_parameters()), before)
    assert "training_step" not in vars(module)


def test_what_changes_in_training_alone_is_fine(tmp_path):
    module = CountsInTraining()
    fit(tmp_path, module, make())
    assert module.num_steps == 12


def test_metrics_in_the_module_see_training_alone(tmp_path):
    class Measured(Dict):
        def __init__(self):
            super().__init__()
            self.mean, self.every = torchmetrics.MeanMetric(), torchmetrics.CatMetric()

        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.mean(outputs["loss"].detach())
            self.every.update(outputs["sample_loss"].detach())
            return outputs

    module, made = Measured(), make()
    fit(tmp_path, module, made)
    assert made.run_statistics.unseen.sum() == 24
    assert module.mean.update_count == module.every.update_count == 12
    assert len(module.every.compute()) == made.run_statistics.seen.sum()


@pytest.mark.parametrize("own", [False, True])
def test_other_shards_need_shards(tmp_path, own):
    callbacks = [ParameterAveragingCallback(1)] if own else []
    with pytest.raises(
        ValueError, match=r"shards in a ShardedDataModule for 'other_shards', but got one. Train with 2"
    ):
        fit(tmp_path, Dict(), make(reference="other_shards"), *callbacks)


def test_other_shards_of_a_stream_are_refused(tmp_path):
    data = ShardedDataModule.from_loader(DataLoader(Stream(), batch_size=2), loader(5), num_shards=2, num_samples=7)
    callbacks = [make(reference="other_shards"), ParameterAveragingCallback(2)]
    with pytest.raises(ValueError, match="map-style training set for 'other_shards', but got a stream"):
        quiet_trainer(tmp_path, callbacks=callbacks).fit(Dict(), data)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"reference": "test"},
            "Argument `reference` expected one of 'training', 'held_out', 'other_shards', 'train', but got 'te",
        ),
        ({"normalize": "mean"}, "Argument `normalize` expected one of None, 'kept', 'batch', but got 'mean'"),
        ({"reference_every": 0}, "Argument `reference_every` expected at least 1, but got 0"),
        ({"reference_batch_size": 0}, "Argument `reference_batch_size` expected at least 1, but got 0"),
        ({"reference_images": -1}, "Argument `reference_images` expected at least 1, but got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AntiGradientControl(**kwargs)


def test_defaults_by_reference():
    train, unseen = AntiGradientControl(), AntiGradientControl(0.9, reference="held_out")
    assert (train.decay, train.bins.num_bins, train.normalize) == (0.8, 1000, "kept")
    assert (unseen.decay, unseen.bins.num_bins, unseen.normalize) == (0.9, 50, "batch")
    assert AntiGradientControl(reference="held_out", num_timesteps=10).bins.num_bins == 10


@pytest.mark.parametrize("max_steps", [2, 8])
def test_the_gap_at_the_end_of_a_run_is_also_of_an_epoch_that_was_broken_off(tmp_path, max_steps):
    """Callbacks ask for it when training ends, before the control is taken down."""
    found = []

    class Asks(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            found.append(agc.gap())

    agc = make(reference_every=1)
    fit(tmp_path, Dict(), agc, Asks(), max_epochs=-1, max_steps=max_steps)
    assert math.isfinite(found[0])
    assert agc.gap() == pytest.approx(found[0], rel=1e-12)
