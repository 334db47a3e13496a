"""Redistribution against a walk by hand: shards, banks and counts in dictionaries, exchanges by sorted lists."""

import logging
import math
from collections import defaultdict
from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_iet import (
    AntiGradientControl,
    DigitsDataModule,
    ParameterAveragingCallback,
    Redistribution,
    ShardedDataModule,
)
from lightning_iet.data import WithIndex
from lightning_iet.functional.sharding import from_assignment, partition
from tests.helpers.interrupted import SEED, Saves, train_on_shards
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

THRESHOLD, DECAY, TIMESTEPS = 0.7, 0.3, 2


class Given(pl.LightningModule):
    """Its losses are the data's: sample i has loss x_i at timestep i mod 2, whatever is learnt."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        x, *_, index = batch
        losses = x + 0 * self.weight
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": index % TIMESTEPS}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def given_losses(num, seed=0):
    """Every third loss is low, so that its sample is skipped mostly."""
    x = 1 + torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
    x[::3] *= 0.2 + torch.rand(len(x[::3]), generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    return x


class Labelled(Dataset):
    """Losses with labels, and the index last."""

    def __init__(self, num):
        self.x = given_losses(num)
        self.targets = torch.arange(num) * 7 % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.targets[index], index


class Watch(pl.Callback):
    """Writes down which samples each shard reads in each epoch, in order."""

    def __init__(self, agc):
        self.agc, self.read = agc, defaultdict(list)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.read[trainer.current_epoch, self.agc.shard].append(batch[-1].tolist())


def run(folder, redistribution, *, num=31, num_shards=3, epochs=8, dataset=None, rounds=None, agc=None, batch_size=4):
    torch.manual_seed(SEED)
    agc = agc or AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1)
    averaging, watch = ParameterAveragingCallback(num_shards, **(rounds or {"every_n_epochs": 2})), Watch(agc)
    loader = DataLoader(Labelled(num) if dataset is None else dataset, batch_size=batch_size, shuffle=True)
    data = ShardedDataModule.from_loader(loader, num_shards=num_shards)
    trainer = quiet_trainer(folder, callbacks=[agc, averaging, redistribution, watch], max_epochs=epochs)
    trainer.fit(Given(), data)
    return watch.read, agc, trainer


class Oracle:
    """Anti-gradient control and the exchange, sample by sample."""

    def __init__(self, losses, shards, labels=None, **settings):
        self.losses, self.shards, self.labels = losses.tolist(), [sorted(shard.tolist()) for shard in shards], labels
        self.banks = [[0.0] * TIMESTEPS for _ in shards]
        self.skips = defaultdict(int)
        self.settings = {"fraction": 0.25, "min_skips": 1} | settings

    def batch(self, shard, indices):
        bank = self.banks[shard]
        for i in indices:
            self.skips[i] += self.losses[i] < THRESHOLD * bank[i % TIMESTEPS]
        for i in indices:
            bank[i % TIMESTEPS] = DECAY * bank[i % TIMESTEPS] + (1 - DECAY) * self.losses[i]

    def exchange(self):
        labels = self.labels or [0] * len(self.losses)
        leaving = [set() for _ in self.shards]
        for label in set(labels):
            found, most = [], []
            for shard in self.shards:
                members = [i for i in shard if labels[i] == label]
                eligible = [i for i in members if self.skips[i] >= self.settings["min_skips"]]
                found.append(sorted(eligible, key=lambda i: (-self.skips[i], i)))
                most.append(min(math.floor(self.settings["fraction"] * len(members)), len(eligible)))
            for c, eligible in enumerate(found):
                leaving[c] |= set(eligible[: min(most)])
        before = self.shards
        self.shards = [sorted((set(shard) - leaving[c]) | leaving[c - 1]) for c, shard in enumerate(before)]
        self.skips.clear()
        return sum(map(len, leaving))


# When exchanges are due: (rounds, how many steps each shard takes in an epoch, epochs after which samples move)
ROUNDS = {
    "even": ({"every_n_epochs": 2}, "half_round", [0, 2, 4, 6]),
    "odd": ({"every_n_epochs": 3}, "half_round", [1, 4, 7]),
    "one": ({"every_n_epochs": 1}, "half_round", [*range(8)]),
    "at its end": ({"every_n_epochs": 3}, "round", [2, 5]),
    "by steps": ({"every_n_train_steps": 7}, "half_round", [1, 3, 5]),  # 3.5, 10.5, 17.5 of 3 a epoch
}


@pytest.mark.parametrize(("labelled", "name"), [*((False, name) for name in ROUNDS), (True, "odd"), (True, "by steps")])
def test_equals_a_walk_by_hand(tmp_path, name, labelled):
    rounds, at, epochs = ROUNDS[name]
    num, num_shards = 31, 3
    dataset = Labelled(num) if labelled else WithIndex(TensorDataset(given_losses(num)))
    labels = dataset.targets if labelled else None
    fraction = 0.5 if labelled else 0.25  # a quarter of a class in a shard is less than one sample
    read, agc, trainer = run(tmp_path, Redistribution(fraction, at=at), dataset=dataset, rounds=rounds)
    shards = partition(num, num_shards, labels=labels, seed=0)
    classes = None if labels is None else labels.tolist()
    oracle, moved = Oracle(given_losses(num), shards, classes, fraction=fraction), []
    sizes = [len(shard) for shard in oracle.shards]
    for epoch in range(8):
        for shard in range(num_shards):
            batches = read[epoch, shard]
            assert sorted(i for batch in batches for i in batch) == oracle.shards[shard]  # each sample once
            for batch in batches:
                oracle.batch(shard, batch)
        if epoch in epochs:
            moved.append(oracle.exchange())
        assert [len(shard) for shard in oracle.shards] == sizes
    assert sum(moved) > 3  # else this test shows nothing
    assert trainer.callback_metrics["agc/moved"] == moved[-1]
    assert agc.counts.since_exchange()[1].tolist() == [oracle.skips[i] for i in range(num)]


def test_more_than_one_round_in_an_epoch_exchange_once(tmp_path):
    read, *_ = run(tmp_path, Redistribution(0.5), rounds={"every_n_train_steps": 1}, epochs=5)
    oracle = Oracle(
        given_losses(31),
        partition(31, 3, labels=Labelled(31).targets, seed=0),
        Labelled(31).targets.tolist(),
        fraction=0.5,
    )
    moved = []
    for epoch in range(4):
        for shard in range(3):
            for batch in read[epoch, shard]:
                oracle.batch(shard, batch)
        moved.append(oracle.exchange())
        assert [sorted(chain(*read[epoch + 1, shard])) for shard in range(3)] == oracle.shards
    assert sum(moved) > 0


@pytest.mark.parametrize("settings", [{"within": "shard"}, {"within": "shard", "min_skips": 2}, {"fraction": 0.5}])
def test_settings(tmp_path, settings):
    read, *_ = run(tmp_path, Redistribution(**settings), epochs=4)
    labels, moved = None if "within" in settings else Labelled(31).targets.tolist(), 0
    settings = {name: value for name, value in settings.items() if name != "within"}
    oracle = Oracle(given_losses(31), partition(31, 3, labels=Labelled(31).targets, seed=0), labels, **settings)
    for epoch in range(4):
        for shard in range(3):
            assert sorted(chain(*read[epoch, shard])) == oracle.shards[shard]
            for batch in read[epoch, shard]:
                oracle.batch(shard, batch)
        if epoch % 2 == 0:
            moved += oracle.exchange()
    assert moved > 0  # else this test shows nothing


def test_what_a_loader_drops_is_not_counted(tmp_path):
    torch.manual_seed(SEED)
    agc = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1)
    watch, averaging = Watch(agc), ParameterAveragingCallback(3, every_n_epochs=2)
    loader = DataLoader(Labelled(31), batch_size=4, shuffle=True, drop_last=True)
    data = ShardedDataModule.from_loader(loader, num_shards=3)
    quiet_trainer(tmp_path, callbacks=[agc, averaging, Redistribution(0.25, within="shard"), watch], max_epochs=3).fit(
        Given(), data
    )
    read = [i for batches in watch.read.values() for batch in batches for i in batch]
    assert len(read) == 3 * 3 * 8  # two batches of each shard
    assert agc.counts.seen.tolist() == [read.count(i) for i in range(31)]


def test_at_random_as_many_move(tmp_path):
    rounds = {"every_n_epochs": 8}  # the exchange comes after 4 epochs, in which enough samples are skipped
    by_skips, _, trainer = run(tmp_path / "a", Redistribution(0.25, within="shard"), epochs=5, rounds=rounds)
    random = Redistribution(0.25, within="shard", choose="random")
    at_random, *_ = run(tmp_path / "b", random, epochs=5, rounds=rounds)
    left = []
    for read in (by_skips, at_random):
        before, after = ([set(chain(*read[epoch, shard])) for shard in range(3)] for epoch in (3, 4))
        left.append([sorted(a - b) for a, b in zip(before, after, strict=True)])
    assert [len(samples) for samples in left[0]] == [len(samples) for samples in left[1]]
    assert sum(map(len, left[0])) == trainer.callback_metrics["agc/moved"] > 3
    assert left[0] != left[1]


def test_what_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        read, _, trainer = run(tmp_path, Redistribution(0.5), epochs=14, rounds={"every_n_epochs": 8})
    oracle = Oracle(
        given_losses(31),
        partition(31, 3, labels=Labelled(31).targets, seed=0),
        Labelled(31).targets.tolist(),
        fraction=0.5,
    )
    told = []
    for epoch in range(14):
        for shard in range(3):
            for batch in read[epoch, shard]:
                oracle.batch(shard, batch)
        if epoch in (3, 11):  # in the middle of each round
            before, skips = oracle.shards, dict(oracle.skips)
            moved = oracle.exchange()
            changed = [i for a, b in zip(before, oracle.shards, strict=True) for i in set(a) - set(b)]
            draws = 4 if epoch == 3 else 8  # since the last exchange
            told.append((moved, changed, skips, draws))
    (first, moved_first, _, _), (second, moved_second, skips, draws) = told
    metrics = trainer.callback_metrics
    assert metrics["agc/moved"] == second
    assert metrics["redistribution/moved_share"] == pytest.approx(len({*moved_first, *moved_second}) / 31)
    for name, samples in (("before", moved_second), ("after", moved_first)):
        expected = sum(skips.get(i, 0) for i in samples) / (draws * len(samples))
        assert metrics[f"redistribution/skip_rate_{name}"] == pytest.approx(expected)
    assert f"Redistribution: {first} of 31 samples move, " in caplog.text
    assert "along the ring of shards 0 → 1, 1 → 2, 2 → 0" in caplog.text


# --- processes, interruptions ----------------------------------------------------------------------------------------


# From which runs go on: around the exchange after the first epoch (in the step that ends the epoch, after it), and
# later.
NAMES = ("0-7", "0-end", "1-0", "2-end")


def diffusion(
    folder,
    world_size=1,
    *,
    ckpt_path=None,
    save_to=None,
    names=NAMES,
    reference="other_shards",
    num_shards=4,
    epochs=3,
    without=False,
    limit_val_batches=0,
    **kwargs,
):
    """Train digits in shards with exchanges; what is left of it."""
    agc = AntiGradientControl(0.95, num_bins=3, decay=0.3, reference=reference, reference_every=1)
    redistribution = Redistribution(**({"fraction": 0.25} | kwargs))
    callbacks = [agc, ParameterAveragingCallback(num_shards, every_n_epochs=2), *([] if without else [redistribution])]
    options = {"batch_size": 6, "epochs": epochs, "world_size": world_size, "ckpt_path": ckpt_path}
    options["limit_val_batches"] = limit_val_batches
    module, _ = train_on_shards(
        folder, callbacks, 12 * num_shards, num_shards, **options, saves=save_to and Saves(save_to, names)
    )
    state = {} if without else redistribution.state_dict()
    tables = {name: state[name] for name in ("assignment", "moves") if state.get(name) is not None}
    return {"model": state_of(module), "tables": tables | {"counts": agc.counts.shared.clone()}}


def assert_equal(a, b):
    assert_same_bits(a["model"], b["model"])
    assert_same_bits(a["tables"], b["tables"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What is left of a run that nobody disturbs, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return diffusion(folder, save_to=folder), folder


def test_the_number_of_processes_changes_nothing(tmp_path, processes, whole_run):
    alone, _ = whole_run
    assert alone["tables"]["moves"].sum() > 3
    for found in processes(4).run(diffusion, tmp_path, 4):
        assert_equal(found, alone)


def test_replicas_exchange_the_same(tmp_path, processes):
    results = processes(4).run(diffusion, tmp_path, 4, num_shards=2, epochs=4, reference="training")
    assert results[0]["tables"]["moves"].sum() > 0
    for found in results[1:]:
        assert_equal(found, results[0])


@pytest.mark.parametrize("name", ["0-7", "0-end", "1-0"])
def test_a_run_goes_on_from_any_step_bit_for_bit(tmp_path, whole_run, name):
    whole, folder = whole_run
    assert_equal(diffusion(tmp_path, ckpt_path=folder / f"{name}.ckpt"), whole)


def test_samples_move_once_where_lightning_ends_an_epoch_again(tmp_path):
    """As it does after a checkpoint that was written in the validation at the end of an epoch."""
    settings = {"min_skips": 0, "choose": "random", "epochs": 2, "limit_val_batches": 1, "reference": "training"}
    whole = diffusion(tmp_path, save_to=tmp_path, names=["0-validated"], **settings)
    assert_equal(diffusion(tmp_path / "again", ckpt_path=tmp_path / "0-validated.ckpt", **settings), whole)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, processes, whole_run):
    whole, folder = whole_run
    for found in processes(2).run(diffusion, tmp_path, 2, ckpt_path=folder / "0-7.ckpt"):
        assert_equal(found, whole)


def test_zero_is_a_run_without_it_and_keeps_the_shards_of_a_checkpoint(tmp_path, whole_run):
    settings = {"epochs": 2, "reference": "training"}
    off, without = (diffusion(tmp_path, **kwargs, **settings) for kwargs in ({"fraction": 0.0}, {"without": True}))
    assert_equal(off, without)
    assert set(off["tables"]) == {"counts"}
    before, folder = whole_run
    with pytest.warns(UserWarning, match=r"other settings than the checkpoint's: fraction 0.25 to 0.0"):
        found = diffusion(tmp_path, ckpt_path=folder / "2-end.ckpt", fraction=0.0, epochs=4)
    assert before["tables"]["moves"].sum() > 0
    for name in ("assignment", "moves"):
        assert torch.equal(found["tables"][name], before["tables"][name])


def test_a_checkpoint_without_it_starts_from_the_initial_split(tmp_path):
    diffusion(tmp_path, save_to=tmp_path / "all", epochs=1, fraction=0.0)
    with pytest.warns(UserWarning, match=r"written without it. It starts from the initial split"):
        diffusion(tmp_path, ckpt_path=tmp_path / "all" / "0-end.ckpt", epochs=2)


# --- images of other shards ------------------------------------------------------------------------------------------


class Pools(pl.Callback):
    """Compares the pool of unseen images of each shard, in every step, with sets written by hand."""

    def __init__(self, agc):
        self.agc, self.trained, self.smaller = agc, defaultdict(set), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        shard, sampler = self.agc.shard, trainer.train_dataloader.sampler
        self.trained[shard] |= set(sampler.shards[shard].tolist())
        everything = set(range(31))
        pool = self.agc.unseen_images.pool(shard).tolist()
        assert len(pool) == len(set(pool))
        assert set(pool) == everything - self.trained[shard]
        self.smaller += len(pool) < 31 - len(sampler.shards[shard])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch + 1) % 3 == 0 and batch_idx + 1 == trainer.num_training_batches:
            self.trained.clear()  # averaged


class Measurable(Given):
    """Changes nothing outside of training."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return outputs | {"sample_loss": outputs["sample_loss"] + 0.1 * torch.rand(len(outputs["sample_loss"]))}


def test_a_moved_sample_is_no_unseen_image_until_the_next_averaging(tmp_path):
    torch.manual_seed(SEED)
    agc = AntiGradientControl(
        0.9, num_timesteps=TIMESTEPS, reference="other_shards", reference_every=1, sample_index=-1
    )
    pools, redistribution = Pools(agc), Redistribution(0.5)
    averaging = ParameterAveragingCallback(3, every_n_epochs=3)
    data = ShardedDataModule.from_loader(DataLoader(Labelled(31), batch_size=4, shuffle=True), num_shards=3)
    quiet_trainer(tmp_path, callbacks=[agc, averaging, redistribution, pools], max_epochs=9).fit(Measurable(), data)
    assert pools.smaller > 0


# --- bad input -------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return ((x, i) for i, x in enumerate(given_losses(12)))

    def __len__(self):
        return 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fraction": 0.6}, r"Argument `fraction` expected a number in \[0, 0.5\], but got 0.6"),
        ({"min_skips": -1}, "Argument `min_skips` expected an integer ≥ 0, but got -1"),
        ({"at": "epoch"}, "Argument `at` expected one of 'half_round', 'round', but got 'epoch'"),
        ({"within": "label"}, "Argument `within` expected one of 'class', 'shard', None, but got 'label'"),
        ({"choose": "least"}, "Argument `choose` expected one of 'most_skipped', 'random', but got 'least'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Redistribution(**kwargs)


def refused(tmp_path, *callbacks, data=None, dataset=None):
    loader = DataLoader(Labelled(31) if dataset is None else dataset, batch_size=4)
    data = ShardedDataModule.from_loader(loader, num_shards=3) if data is None else data
    quiet_trainer(tmp_path, callbacks=[*callbacks, Redistribution(within="shard")], max_epochs=1).fit(Given(), data)


def agc():
    return AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, sample_index=-1)


def test_what_is_missing(tmp_path):
    three = ParameterAveragingCallback(3)
    loader = DataLoader(Labelled(31), batch_size=4)
    stream = ShardedDataModule.from_loader(DataLoader(Stream(), batch_size=2), num_shards=3)
    with pytest.raises(ValueError, match="expected an AntiGradientControl among the trainer's callbacks, but got none"):
        refused(tmp_path, three)
    with pytest.raises(ValueError, match="expected a ParameterAveragingCallback among the trainer's callbacks"):
        refused(tmp_path, agc(), data=loader)
    with pytest.raises(ValueError, match=r"`fraction` expected 0 with 1 shard, but got 0.25: samples move from"):
        refused(tmp_path, agc(), ParameterAveragingCallback(1), data=loader)
    with pytest.raises(ValueError, match=r"expected batches with the index of each sample.* samples of TensorDataset"):
        refused(tmp_path, AntiGradientControl(0.5, num_timesteps=2), three, dataset=TensorDataset(given_losses(31)))
    with pytest.raises(ValueError, match=r"expected batches with the index of each sample, .* but got a stream"):
        refused(tmp_path, agc(), three, data=stream)


def test_classes_that_are_not_known(tmp_path):
    data = ShardedDataModule.from_loader(
        DataLoader(WithIndex(TensorDataset(given_losses(31))), batch_size=4), num_shards=3
    )
    callbacks = [agc(), ParameterAveragingCallback(3), Redistribution(within="class")]
    with pytest.raises(
        ValueError, match="`within` expected 'shard' for a training set that is not split by labels, bu"
    ):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Given(), data)


def test_an_index_of_another_data_set(tmp_path):
    inner = WithIndex(TensorDataset(given_losses(31)))
    dataset = torch.utils.data.Subset(inner, list(range(30, -1, -1)))
    with pytest.raises(
        ValueError, match=r"each sample's index in the data set that is split .* be the outermost wrapper"
    ):
        refused(tmp_path, AntiGradientControl(0.5, num_timesteps=2), ParameterAveragingCallback(3), dataset=dataset)


def test_a_sampler_with_repeats(tmp_path):
    sampler = WeightedRandomSampler(torch.ones(31), 31, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(Labelled(31), batch_size=4, sampler=sampler)
    data = ShardedDataModule.from_loader(loader, num_shards=3)
    callbacks = [agc(), ParameterAveragingCallback(3, every_n_epochs=2), Redistribution(0.25, within="shard")]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=4).fit(Given(), data)  # shards keep equal parts


def test_what_is_said(tmp_path, caplog):
    three = ParameterAveragingCallback(3)
    with pytest.warns(UserWarning, match="moves nothing: AntiGradientControl is off"):
        refused(tmp_path, AntiGradientControl(0, num_timesteps=TIMESTEPS, sample_index=-1), three)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        refused(tmp_path, agc(), three)
        assert "a round of one epoch has no epoch boundary inside" in caplog.text
        run(tmp_path, Redistribution(0.5, min_skips=9), epochs=1)
    assert (
        "0 of 31 samples move: no class with enough samples in every shard has in every shard some that were skipped 9"
        " times or more, and all" in caplog.text
    )
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"),
        pytest.warns(UserWarning, match="0.01 of the smallest shard is less than one sample. Set a larger fraction.$"),
    ):
        run(tmp_path, Redistribution(0.01, within="shard"), epochs=1)
    assert "0 of 31 samples move: a fraction of 0.01 of the smallest shard is less than one sample." in caplog.text
    one_each = Labelled(31)
    one_each.targets = torch.arange(31) % 10  # a shard has one or two of a class
    with pytest.warns(UserWarning, match=r"of each class, a fraction of 0.5 is less .* one shard. Set within='shard'"):
        run(tmp_path, Redistribution(0.5), epochs=1, dataset=one_each)
    data = ShardedDataModule(DigitsDataModule(40, batch_size=8), 2)
    callbacks = [AntiGradientControl(0.5), ParameterAveragingCallback(2), Redistribution(0.25)]
    with pytest.warns(
        UserWarning, match="of each class, a fraction of 0.25 is less .* Set a larger fraction or within='shard'"
    ):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, limit_val_batches=0).fit(tiny_diffusion(), data)


def test_shards_are_restored_from_the_assignment():
    shards = [torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])]
    assignment = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.int16)
    assert [shard.tolist() for shard in from_assignment(assignment, 2)] == [shard.tolist() for shard in shards]
