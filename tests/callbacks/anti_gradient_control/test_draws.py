"""Weights by record that act on how often a sample is drawn: METHODS 2c by hand, with the draws of each epoch."""

import math
import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, Redistribution, ShardedDataModule
from lightning_iet.data import DrawnByWeight, ImageDataModule, IndexedImages, WithIndex
from lightning_iet.evaluation.assessment import real_sets
from lightning_iet.functional.sample_record import draw_by_weight, pace_of_draws
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.devices import CountWaits
from tests.helpers.interrupted import Saves
from tests.helpers.models import quiet_trainer
from tests.helpers.weights import assert_same_bits, state_of

SEED, TIMESTEPS, BINS, NUM = 3, 4, 2, 40


# --- the functions ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.02, 1), min_size=1, max_size=30), st.integers(0, 2**31))
def test_each_is_drawn_in_proportion_rounded_up_or_down_and_keeps_its_place(values, seed):
    weights = torch.tensor(values, dtype=torch.float64)
    drawn = draw_by_weight(weights, generator=torch.Generator().manual_seed(seed)).tolist()
    times = Counter(drawn)
    for i, value in enumerate(values):
        expected = len(values) * value / sum(values)
        assert math.floor(expected - 1e-9) <= times[i] <= math.ceil(expected + 1e-9)
        assert drawn[i] == i or not times[i]


def test_on_average_each_is_drawn_as_often_as_its_weight_says():
    weights = torch.tensor([1.0, 0.5, 0.25, 0.02, 1.0])
    generator = torch.Generator().manual_seed(0)
    counts = sum(draw_by_weight(weights, generator=generator).bincount(minlength=5) for _ in range(4_000)) / 4_000
    # Draws of one epoch are rounded: the standard error of a share is at most 0.5 / sqrt(4,000) = 0.008.
    assert (counts - 5 * weights / weights.sum()).abs().max() < 0.04


@given(st.integers(1, 200), st.floats(0.02, 1), st.integers(0, 2**31))
def test_equal_weights_change_nothing(size, value, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_by_weight(torch.full((size,), value), generator=generator)
    assert drawn.tolist() == list(range(size))


def test_what_is_drawn_again_takes_free_places_in_random_order():
    weights = torch.tensor([1.0] * 6 + [1e-6] * 6)
    found = {tuple(draw_by_weight(weights, generator=torch.Generator().manual_seed(s)).tolist()) for s in range(50)}
    assert all(places[:6] == (0, 1, 2, 3, 4, 5) and sorted(places[6:]) == [0, 1, 2, 3, 4, 5] for places in found)
    assert len(found) > 40


def test_the_pace_of_weights():
    weights = torch.tensor([1.0, 0.5, 0.02, 1.0])
    expected = [min(float(weights.mean()) / w, 5.0) for w in weights.tolist()]
    assert pace_of_draws(weights).tolist() == pytest.approx(expected)


# --- the callback ----------------------------------------------------------------------------------------------------


class Known(pl.LightningModule):
    """Every fourth sample has a loss much smaller than the others', whatever the network; writes down what it reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.read = []

    def training_step(self, batch, batch_idx):
        index = batch[-1]
        self.read.append((self.current_epoch, index.tolist()))
        losses = self.losses(index)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": index % TIMESTEPS}

    def losses(self, index):
        jitter = 1 + 0.1 * torch.sin(index.double() + self.current_epoch)
        return self.weight.square() * (1 - 0.8 * (index % 4 == 0).double()) * jitter

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Validated(Known):
    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""


class Double(pl.Callback):
    """Keeps records in float64, as the loop does."""

    def __init__(self, agc):
        self.agc = agc

    def on_train_start(self, trainer, pl_module):
        self.agc.records.double()
        self.agc.draws.draw_pace = self.agc.draws.draw_pace.double()


def control(**kwargs):
    agc = AntiGradientControl(
        **({"criterion": "record", "eta": 0.3, "weigh": "draws", "num_timesteps": TIMESTEPS, "num_bins": 1} | kwargs)
    )
    if agc.log_losses is not None:
        mean, variance, number = agc.log_losses
        agc.log_losses = type(agc.log_losses)(mean.double(), variance.double(), number)
    return agc


def by_hand(epochs, batch_size=5, eta=0.3):
    """The samples of each batch, their weights, and the network, by a loop."""
    module = Known()
    record, log_weight, pace, values = [0.0] * NUM, [0.0] * NUM, [1.0] * NUM, []
    drawn, batches, order = set(), [], list(range(NUM))
    for epoch in range(epochs):
        for start in range(0, NUM, batch_size):
            index = order[start : start + batch_size]
            batches.append((epoch, index))
            jitter = [1 + 0.1 * math.sin(i + epoch) for i in index]
            weight = float(module.weight.detach())
            losses = [weight**2 * (0.2 if i % 4 == 0 else 1.0) * j for i, j in zip(index, jitter, strict=True)]
            for i, loss in zip(index, losses, strict=True):
                z = 0.0
                if len(values) >= 20:
                    total = sum(w for _, w in values)
                    mean = sum(w * x for x, w in values) / total
                    deviation = math.sqrt(sum(w * (x - mean) ** 2 for x, w in values) / total)
                    z = (math.log(loss) - mean) / max(deviation, 1e-3)
                drawn.add(i)
                record[i] = 0.8 * record[i] + 0.2 * z
            median = sorted(record[i] for i in drawn)[(len(drawn) - 1) // 2]
            for i in set(index):
                step = index.count(i) * eta * pace[i] * (record[i] - median)
                log_weight[i] = min(max(log_weight[i] + step, math.log(0.02)), 0.0)
            share = 0.9 ** len(losses)
            values = [(x, w * share) for x, w in values]
            values += [(math.log(loss), (1 - share) / 0.1 / len(losses)) for loss in losses]
            gradient = 2 * weight * sum(loss / weight**2 for loss in losses) / len(losses)  # each counts alike
            module.weight.data -= 1e-3 * gradient
        weights = torch.tensor(log_weight, dtype=torch.float64).exp()
        generator = torch.Generator().manual_seed(derive_seed(SEED, epoch + 1, 0, 5))
        order = draw_by_weight(weights, generator=generator).tolist()
        pace = [min(float(weights.mean() / w), 5.0) for w in weights]
    return batches, log_weight, module.weight.detach()


def loader(**kwargs):
    return DataLoader(DrawnByWeight(WithIndex(TensorDataset(torch.zeros(NUM, 1)))), batch_size=5, **kwargs)


def fit(folder, module, *callbacks, data=None, epochs=8, **kwargs):
    torch.manual_seed(SEED)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=epochs, limit_val_batches=0, **kwargs)
    trainer.fit(module, loader() if data is None else data)
    return trainer


def test_equals_the_loop(tmp_path):
    agc, module, data = control(), Known(), loader()
    fit(tmp_path, module, agc, Double(agc), data=data)
    batches, log_weight, weight = by_hand(8)
    assert module.read == batches
    assert agc.records.log_weights.tolist() == pytest.approx(log_weight, rel=1e-9, abs=1e-9)
    assert float(module.weight.detach()) == pytest.approx(float(weight), rel=1e-9)
    seen, known = agc.counts.seen, torch.arange(NUM) % 4 == 0
    assert seen.sum() == 8 * NUM
    assert seen[known].float().mean() < 6 < 8 < seen[~known].float().mean()  # else this test shows nothing
    assert agc.counts.skipped.sum() == 0
    assert data.dataset.table.sample.tolist() == list(range(NUM))  # afterwards the data are as they were


def test_no_step_waits_for_the_device(tmp_path):
    def waits(steps, *callbacks):
        with CountWaits() as counted:
            fit(tmp_path, Known(), *callbacks, epochs=3, limit_train_batches=steps)
        return counted.count

    assert waits(6, control()) - waits(3, control()) == waits(6) - waits(3)


@pytest.mark.parametrize("weigh", ["losses", "draws"])
def test_a_rate_of_zero_changes_no_bit(tmp_path, weigh):
    plain, module = Known(), Known()
    fit(tmp_path, plain, data=DataLoader(WithIndex(TensorDataset(torch.zeros(NUM, 1))), batch_size=5), epochs=3)
    fit(tmp_path, module, control(eta=0.0, weigh=weigh), epochs=3)
    assert module.read == plain.read
    assert_same_bits(state_of(module), state_of(plain))


class Points(ImageDataModule):
    """Pictures of which the losses do not depend."""

    def load(self):
        return IndexedImages(torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2)


NAMES = ("0-3", "0-end", "2-5", "2-7", "3-1")  # of checkpoints from which runs go on


def shards(folder, world_size=1, *, workers=0, num_shards=2, ckpt_path=None, save=None, epochs=6):
    """What is read in each epoch of a run in shards, the tables, and the network."""
    torch.manual_seed(SEED)
    agc, module = control(), Validated()
    trainer = quiet_trainer(
        folder,
        callbacks=[
            agc,
            *([ParameterAveragingCallback(num_shards, every_n_epochs=2)] if num_shards > 1 else []),
            *([Saves(save, NAMES)] if save else []),
        ],
        max_epochs=epochs,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=0,
        enable_checkpointing=save is not None,
    )
    points = Points(num_control=10, num_reference=10, batch_size=5, num_workers=workers)
    data = ShardedDataModule(points, num_shards) if num_shards > 1 else points
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*yielded None.*")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    tables = {**agc.counts.state_dict(), **agc.records.state_dict(), **agc.draws.state_dict()}
    read = sorted((epoch, i) for epoch, batch in module.read for i in batch)
    parts = [part.tolist() for part in data.train_dataloader().sampler.shards] if num_shards > 1 else []
    return {
        "read": read,
        "shards": parts,
        "tables": {name: table.clone() for name, table in tables.items()},
        "model": state_of(module),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return shards(folder, save=folder), folder


def test_places_are_given_to_samples_of_the_same_shard(whole):
    result, _ = whole
    group, table = result["tables"]["draw_group"], result["tables"]["draw_table"]
    assert group.bincount().tolist() == [20, 20]
    assert torch.equal(group[table], group)
    assert (table != torch.arange(40)).sum() > 3
    seen, known = result["tables"]["shared"][0], torch.arange(40) % 4 == 0
    assert seen.sum() == 6 * 40
    assert seen[known].float().mean() < seen[~known].float().mean() - 1


@pytest.mark.parametrize("name", NAMES[1:])  # the first one: with workers, below
def test_a_run_goes_on_from_any_step(tmp_path, whole, name):
    result, folder = whole
    found = shards(tmp_path, ckpt_path=folder / f"{name}.ckpt")
    assert_same_bits(found["model"], result["model"])
    assert_same_bits(found["tables"], result["tables"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_change_nothing(tmp_path, processes, whole, world_size):
    result, folder = whole
    ranks = processes(world_size).run(shards, tmp_path, world_size, epochs=6 if world_size == 2 else 3)
    if world_size == 2:  # four processes train two shards: batches are other ones
        assert sorted(pair for found in ranks for pair in found["read"]) == result["read"]
        ranks += processes(world_size).run(shards, tmp_path, world_size, ckpt_path=folder / "2-5.ckpt")
        for found in ranks:
            assert_same_bits(found["model"], result["model"])
            assert_same_bits(found["tables"], result["tables"])
    for found in ranks:
        assert torch.equal(found["tables"]["draw_table"], ranks[0]["tables"]["draw_table"])
    assert (ranks[0]["tables"]["draw_table"] != torch.arange(40)).any()


def test_plain_ddp_draws_by_one_table(tmp_path, processes):
    first, second = processes(2).run(shards, tmp_path, 2, num_shards=1)
    assert torch.equal(first["tables"]["draw_table"], second["tables"]["draw_table"])
    assert (first["tables"]["draw_table"] != torch.arange(40)).any()
    by_epoch = Counter(epoch for epoch, _ in first["read"] + second["read"])
    assert by_epoch == dict.fromkeys(range(6), 40)


def test_workers_change_nothing(tmp_path, whole):
    result, folder = whole
    found = shards(tmp_path, workers=2, ckpt_path=folder / "0-3.ckpt")  # almost from the start, and resumed
    assert_same_bits(found["model"], result["model"])
    assert_same_bits(found["tables"], result["tables"])


class Cut(pl.Callback):
    def __init__(self, epoch, exception):
        self.epoch, self.exception = epoch, exception

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            raise self.exception


def test_after_an_error_the_data_are_as_they_were(tmp_path):
    data, points = loader(), Points(num_control=10, num_reference=10, batch_size=5)
    for module, each in ((Known(), data), (Validated(), points)):
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, module, control(), Cut(4, ZeroDivisionError()), data=each)
    assert data.dataset.table.sample.tolist() == list(range(NUM))
    assert points.draws is None


def test_from_losses_to_draws_a_cut_epoch_is_read_to_its_end_as_it_began(tmp_path):
    """A run that changes to draws begins with an epoch in which each sample is drawn once, however often it is cut."""

    def part(weigh, ckpt_path, **kwargs):
        torch.manual_seed(SEED)
        module, agc = Validated(), control(weigh=weigh)
        trainer = quiet_trainer(
            tmp_path,
            callbacks=[agc, ParameterAveragingCallback(2), Saves(tmp_path, ("1-end", "2-3"))],
            limit_val_batches=0,
            enable_checkpointing=True,
            **kwargs,
        )
        data = ShardedDataModule(Points(num_control=10, num_reference=10, batch_size=5), 2)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return sorted(i for epoch, batch in module.read if epoch == 2 for i in batch)

    part("losses", None, max_epochs=2)
    with pytest.warns(UserWarning, match="weigh 'losses' to 'draws'"):
        first = part("draws", tmp_path / "1-end.ckpt", max_epochs=3)
    assert first == list(range(40))
    found = part("draws", tmp_path / "2-3.ckpt", max_epochs=3)
    assert len(found) == 20
    assert set(found) <= set(first)


@pytest.mark.parametrize("wrap", [lambda inner: DrawnByWeight(WithIndex(inner)), WithIndex])
def test_what_reads_whole_batches_is_wrapped_as_well(wrap):
    inner, _ = random_split(TensorDataset(torch.arange(12.0)), [8, 4], generator=torch.Generator().manual_seed(0))
    batch = next(iter(DataLoader(wrap(inner), batch_size=4)))
    assert batch[1].tolist() == [0, 1, 2, 3]


def test_copies_are_judged_by_all_training_images():
    images = IndexedImages(torch.rand(6, 1, 4, 4))
    data = Points()
    data.train_set, data.control_set, data.reference_set = DrawnByWeight(images), images, images
    assert real_sets(data)[0] is images


# --- bad input -------------------------------------------------------------------------------------------------------


class Own(pl.LightningDataModule):
    def __init__(self, dataset, *, keep=True):
        super().__init__()
        self.dataset, self.keep = dataset, keep

    def train_dataloader(self):
        return DataLoader(self.dataset if self.keep else WithIndex(self.dataset.dataset.dataset), batch_size=5)


def test_a_data_module_of_ones_own(tmp_path):
    agc, module = control(), Known()
    fit(tmp_path, module, agc, Double(agc), data=Own(loader().dataset))
    assert module.read == by_hand(8)[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(WithIndex(TensorDataset(torch.zeros(NUM, 1))), batch_size=5), "but found none"),
        (DataLoader(Subset(loader().dataset, range(20)), batch_size=5), "outermost"),
        (DataLoader(DrawnByWeight(Subset(loader().dataset.dataset, range(20))), batch_size=5), "outermost"),
        (DataLoader(WithIndex(DrawnByWeight(TensorDataset(torch.zeros(NUM, 1)))), batch_size=5), "outermost"),
        (Own(loader().dataset, keep=False), "it reads another data set"),
    ],
)
def test_data_that_cannot_be_drawn_by_weight(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Known(), control(), data=data)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "ratio", "eta": None}, "`weigh` expected 'losses' with criterion='ratio', which has no weights"),
        ({"weigh": "draw"}, "`weigh` expected one of 'losses', 'draws', but got 'draw'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        control(**kwargs)


def test_two_callbacks_cannot_draw_by_one_table(tmp_path):
    with pytest.raises(ValueError, match="expected one callback with weigh='draws'"):
        fit(tmp_path, Known(), control(denoiser="a"), control(denoiser="b"))


def test_a_checkpoint_of_another_training_set_leaves_the_table(tmp_path):
    fit(tmp_path, Known(), control(), Saves(tmp_path), epochs=2, enable_checkpointing=True)
    data = DataLoader(DrawnByWeight(WithIndex(TensorDataset(torch.zeros(30, 1)))), batch_size=5)
    trainer = quiet_trainer(tmp_path, callbacks=[control()], max_epochs=3, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"counts of 30 samples.* but got those of 40"):
        trainer.fit(Known(), data, ckpt_path=tmp_path / "0-3.ckpt", weights_only=True)
    assert data.dataset.table.sample.tolist() == list(range(30))


def test_a_run_of_one_epoch_is_told_that_nothing_changed(tmp_path):
    with pytest.warns(UserWarning, match="expected more than one epoch for weigh='draws'"):
        fit(tmp_path, Known(), control(), epochs=1)
    with pytest.warns(UserWarning, match="expected more than one epoch for weigh='draws'"):
        fit(tmp_path, Known(), control(), max_steps=8)


def test_a_run_that_ends_within_its_second_epoch_has_drawn_by_weight(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "AntiGradientControl expected")
        fit(tmp_path, Known(), control(), max_steps=9)


def test_redistribution_needs_samples_that_are_left_out(tmp_path):
    data = ShardedDataModule(Points(num_control=10, num_reference=10, batch_size=5), 2)
    callbacks = [control(), ParameterAveragingCallback(2), Redistribution()]
    with pytest.raises(ValueError, match="weigh='draws'"):
        fit(tmp_path, Validated(), *callbacks, data=data)
    callbacks[0] = control(eta=0.0)  # its remedy
    with pytest.warns(UserWarning, match="Redistribution moves nothing"):
        fit(tmp_path, Validated(), *callbacks, data=data, epochs=1)
