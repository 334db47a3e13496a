"""Threshold-aware augmentation against dictionaries that are walked by hand, epoch by epoch."""

import copy
import math
import warnings
from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_iet import (
    AntiGradientControl,
    DigitsDataModule,
    ImageDataModule,
    ParameterAveragingCallback,
    Redistribution,
    ShardedDataModule,
    ThresholdAwareAugmentation,
)
from lightning_iet.data import Augmented, IndexedImages, WithIndex
from lightning_iet.data.augmentation import augment
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.devices import CountWaits
from tests.helpers.interrupted import Saves
from tests.helpers.models import Memory, Pictures, quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

SEED, THRESHOLD, DECAY, TIMESTEPS, NUM = 3, 0.8, 0.8, 3, 24
NAMES = ("0-5", "0-end", "1-2", "1-5", "2-3", "2-end")  # of checkpoints from which runs go on


class Given(pl.LightningModule):
    """Its losses follow from the epoch, the sample and its image alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.read = defaultdict(list)

    def training_step(self, batch, batch_idx):
        images, index = batch[0], batch[-1]
        for i, image in zip(index.tolist(), images, strict=True):
            self.read[self.current_epoch].append((i, image))
        losses = given(images, index, self.current_epoch) + 0 * self.weight
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": index % TIMESTEPS}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def given(images, index, epoch):
    phase = torch.sin(1.7 * index.double() + 2.3 * epoch)
    return 1 + 0.3 * phase + 0.01 * images.double().sum((1, 2, 3))


class Plain(Given):
    """The same, looking at nothing."""

    def training_step(self, batch, batch_idx):
        images, index = batch
        losses = given(images, index, self.current_epoch) + 0 * self.weight
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": index % TIMESTEPS}


def walk(data, orders, *, seed, max_magnitude=5, band=1.5, sharpness=5.0, defer=False):
    """Three tables by hand: (images of each epoch, bank, counts, skips, magnitudes for the next epoch)."""
    bank, seen, skipped, magnitude = [0.0] * TIMESTEPS, defaultdict(int), defaultdict(int), {}
    images, shares = [], []
    for epoch, batches in enumerate(orders):
        coming, shown = dict(magnitude), {}
        for batch in batches:
            losses = {}
            for i in batch:
                strength = magnitude.get(i, 0)
                shown[i] = augment(data.images[i], strength, seed=derive_seed(seed, epoch, i, 2))
                losses[i] = given(shown[i][None], torch.tensor([i]), epoch).item()
            for i in batch:  # judged by the bank before this batch
                if magnitude.get(i, 0):
                    coming[i] = 0
                    continue
                limit = THRESHOLD * bank[i % TIMESTEPS]
                ratio = losses[i] / limit if limit else math.inf
                strength = math.exp(-sharpness * (ratio - 1)) if 1 <= ratio < band else 0
                coming[i] = math.floor(max_magnitude * strength)
                seen[i] += 1
                skipped[i] += losses[i] < limit
            for i in batch:
                if not magnitude.get(i, 0):
                    bank[i % TIMESTEPS] = DECAY * bank[i % TIMESTEPS] + (1 - DECAY) * losses[i]
        shares.append(sum(magnitude.get(i, 0) > 0 for batch in batches for i in batch) / sum(map(len, batches)))
        images.append(shown)
        magnitude = coming
    return images, bank, seen, skipped, magnitude, shares


def agc(**kwargs):
    control = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1, **kwargs)
    control.load_shard_state({"bank": torch.zeros(TIMESTEPS, dtype=torch.float64)})
    return control


def fit(folder, module, *callbacks, dataset=None, epochs=4, batch_size=5, **kwargs):
    torch.manual_seed(SEED)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, DataLoader(dataset, batch_size=batch_size, shuffle=True))
    return trainer


@pytest.mark.parametrize("settings", [{}, {"band": math.inf, "max_magnitude": 30, "sharpness": 2.0}])
def test_equals_tables_walked_by_hand(tmp_path, settings):
    data, control, taa, module = Pictures(), agc(), ThresholdAwareAugmentation(**settings), Given()
    trainer = fit(tmp_path, module, control, taa, dataset=Augmented(data))
    orders = [[read[i : i + 5] for i in range(0, NUM, 5)] for read in orders_of(module)]
    images, bank, seen, skipped, magnitude, shares = walk(data, orders, seed=SEED, **settings)
    for epoch, shown in enumerate(images):
        for i, image in module.read[epoch]:
            assert torch.equal(image, shown[i]), (epoch, i)
    assert control.bank.tolist() == pytest.approx(bank, rel=1e-9)
    assert control.counts.seen.tolist() == [seen[i] for i in range(NUM)]
    assert control.counts.skipped.tolist() == [skipped[i] for i in range(NUM)]
    assert taa.state_dict()["next"].tolist() == [magnitude.get(i, 0) for i in range(NUM)]
    assert trainer.callback_metrics["augmentation/share"] == pytest.approx(shares[-1])
    assert 0 < shares[-1] < 1  # else this test shows nothing
    assert shares[0] == 0


def orders_of(module):
    return [[i for i, _ in module.read[epoch]] for epoch in sorted(module.read)]


def test_no_step_waits_for_the_device(tmp_path):
    def waits(steps, *callbacks):
        with CountWaits() as counted:
            fit(tmp_path, Plain(), *callbacks, dataset=Augmented(Pictures()), epochs=1, limit_train_batches=steps)
        return counted.count

    assert waits(4, agc(), ThresholdAwareAugmentation()) - waits(2, agc(), ThresholdAwareAugmentation()) == waits(
        4
    ) - waits(2)


def test_a_magnitude_is_used_once(tmp_path):
    data, taa, module = Pictures(), ThresholdAwareAugmentation(band=math.inf, max_magnitude=30), Given()
    fit(tmp_path, module, agc(), taa, dataset=Augmented(data), epochs=6)
    changed = [{i for i, image in module.read[epoch] if not torch.equal(image, data.images[i])} for epoch in range(6)]
    for epoch in range(5):
        assert not changed[epoch] & changed[epoch + 1]
    assert sum(map(len, changed)) > 10


def test_deferred_draws_give_no_gradient_and_are_no_skips(tmp_path):
    weights = []

    class Watch(AntiGradientControl):
        def select(self, sample_loss, timesteps):
            selection = super().select(sample_loss, timesteps)
            weights.append(selection.keep.tolist())
            return selection

    data, module = Pictures(), Given()
    control = Watch(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1)
    taa = ThresholdAwareAugmentation(band=math.inf, max_magnitude=30, defer=True)
    fit(tmp_path, module, control, taa, dataset=Augmented(data), epochs=2)
    orders = [[read[i : i + 5] for i in range(0, NUM, 5)] for read in orders_of(module)]
    *_, first, _ = walk(data, orders[:1], seed=SEED, band=math.inf, max_magnitude=30)
    kept = {i: keep for batch, row in zip(orders[0], weights, strict=False) for i, keep in zip(batch, row, strict=True)}
    skipped_first = {i for i in range(NUM) if not kept[i]}
    assert {i for i in range(NUM) if first.get(i, 0)} <= skipped_first
    assert any(first.values())
    augmented = {i for i, magnitude in first.items() if magnitude}
    later = {
        i: keep for batch, row in zip(orders[1], weights[5:], strict=False) for i, keep in zip(batch, row, strict=True)
    }
    assert all(later[i] for i in augmented)  # exempt: always kept
    assert control.counts.skipped.sum() < sum(not keep for row in weights for keep in row)


def test_a_control_forgets_what_was_deferred_in_an_earlier_run(tmp_path):
    control = agc()
    taa = ThresholdAwareAugmentation(band=math.inf, max_magnitude=30, defer=True)
    fit(tmp_path, Given(), control, taa, dataset=Augmented(Pictures()), epochs=1)
    fit(tmp_path, Given(), control, dataset=Pictures(), epochs=1, batch_size=6)


class Breaks(pl.Callback):
    """Ends a run by an error in its second epoch."""

    def __init__(self, data):
        self.data = data

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.current_epoch == trainer.fit_loop.epoch_loop.batch_idx == 1:
            assert self.data.magnitudes.by_sample.any()
            raise ZeroDivisionError


def test_a_control_and_the_data_forget_a_run_that_raised(tmp_path):
    control, data = agc(), Augmented(Pictures())
    taa = ThresholdAwareAugmentation(band=math.inf, max_magnitude=30, defer=True)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Given(), control, taa, Breaks(data), dataset=data)
    assert control.augmentation is None
    assert not control.needs_samples
    assert not data.magnitudes.by_sample.any()
    fit(tmp_path, Given(), control, dataset=Pictures(), epochs=1, batch_size=6)


# --- images of our own data modules: workers, processes, interruptions -----------------------------------------------


class Squares(ImageDataModule):
    """Random colour images."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images = (torch.rand(60, 3, 8, 8, generator=generator) * 255).to(torch.uint8)
        return IndexedImages(images, torch.arange(60) % 2)


class Colours(Given):
    """The same on colour images, with losses that do not tell whether an image was augmented."""

    def training_step(self, batch, batch_idx):
        images, _, index = batch
        for i, image in zip(index.tolist(), images, strict=True):
            self.read[self.current_epoch].append((i, image))
        losses = given(0 * images, index, self.current_epoch) + 0 * self.weight
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": index % TIMESTEPS}

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""


class StopAt(pl.Callback):
    """Ends the run within an epoch, as a limit of time does."""

    def __init__(self, epoch, batch_idx):
        self.at = epoch, batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= (trainer.current_epoch, batch_idx) == self.at


def squares(
    folder, world_size=1, *, workers=0, shards=2, ckpt_path=None, save=None, epochs=4, magnitude=30, stop_at=None
):
    """All images that are read, by epoch and sample, and the tables in the end."""
    torch.manual_seed(SEED)
    control, module = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS), Colours()
    taa = ThresholdAwareAugmentation(magnitude, band=math.inf)
    callbacks = [control, taa, ParameterAveragingCallback(shards, every_n_epochs=2)]
    callbacks += [Redistribution(0.25)] if shards > 1 else []
    callbacks += [StopAt(*stop_at)] if stop_at else []
    logger = Memory()
    data = Squares(num_control=10, num_reference=10, batch_size=7, num_workers=workers, flip=shards > 1)
    trainer = quiet_trainer(
        folder,
        callbacks=[*callbacks, *([Saves(save, NAMES)] if save else [])],
        logger=logger,
        log_every_n_steps=1,
        max_epochs=epochs,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=0,
        enable_checkpointing=save is not None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*yielded None.*")
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # plain training's order
        wrapped = data if shards == 1 else ShardedDataModule(data, shards)
        trainer.fit(module, wrapped, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    read = {(epoch, i): image for epoch, rows in module.read.items() for i, image in rows}
    state = taa.state_dict()
    tables = {name: state[name] for name in ("current", "next")} if state else {}
    shares = {epoch: values.get("augmentation/share") for epoch, values in enumerate(logger.epochs)}
    return {"read": read, "tables": tables, "counts": control.counts.shared.clone(), "shares": shares}


def assert_same_reads(found, whole):
    for key, image in found["read"].items():
        assert torch.equal(image, whole["read"][key]), key
    assert_same_bits(found["tables"], whole["tables"])
    assert torch.equal(found["counts"], whole["counts"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return squares(folder, save=folder), folder


def test_some_images_are_augmented(whole):
    plain = Squares(num_control=10, num_reference=10)
    plain.setup("fit")
    changed = defaultdict(int)
    for (epoch, i), image in whole[0]["read"].items():
        original = plain.train_set[i][0]
        changed[epoch] += not (torch.equal(image, original) or torch.equal(image, original.flip(-1)))
    assert changed[0] == 0
    assert changed[1] > 2


@pytest.mark.parametrize("workers", [2])
def test_workers_change_nothing(tmp_path, whole, workers):
    assert_same_reads(squares(tmp_path, workers=workers), whole[0])


def test_processes_change_nothing(tmp_path, processes, whole):
    results = processes(2).run(squares, tmp_path, 2)
    assert {key for found in results for key in found["read"]} == set(whole[0]["read"])
    for found in results:
        assert_same_reads(found, whole[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "1-5"])
def test_a_run_goes_on_from_any_step(tmp_path, whole, name):
    result, folder = whole
    found = squares(tmp_path, ckpt_path=folder / f"{name}.ckpt")
    assert found["read"].keys() < result["read"].keys()
    assert_same_reads(found, result)


def test_a_run_that_stopped_within_an_epoch_logs_all_of_it(tmp_path, whole):
    """Of which the hooks of the end are called twice."""
    stopped = squares(tmp_path, save=tmp_path, stop_at=(2, 3))
    found = squares(tmp_path, ckpt_path=tmp_path / "2-end.ckpt")
    assert_same_reads(found, whole[0])
    assert 0 < found["shares"][2] == whole[0]["shares"][2] != stopped["shares"][2]
    assert found["shares"][3] == whole[0]["shares"][3]


def test_workers_of_a_resumed_run_read_what_was_decided(tmp_path, whole):
    result, folder = whole
    assert_same_reads(squares(tmp_path, ckpt_path=folder / "1-2.ckpt", workers=2), result)


def test_without_shards_workers_change_nothing(tmp_path):
    alone = squares(tmp_path / "a", shards=1, save=tmp_path / "c", epochs=3)
    # From the second epoch on, a loader that keeps its workers leaves torch's generator, and with it the noise of plain
    # training, in another state than one without workers; so the magnitudes of later epochs come from other losses.
    found = squares(tmp_path / "b", shards=1, workers=2, epochs=2)
    early = {key: image for key, image in alone["read"].items() if key[0] < 2}
    assert len(early) == 80
    assert any(not torch.equal(early[0, i], early[1, i]) for i in range(40))  # some were augmented in the second epoch
    for key, image in early.items():
        assert torch.equal(found["read"][key], image), key
    # Without shards Lightning does not restore the order of an epoch; which samples are augmented, and how, it is not.
    for name, epoch in (("1-2", 1), ("1-5", 2)):
        found = squares(tmp_path / "d", shards=1, ckpt_path=tmp_path / "c" / f"{name}.ckpt", epochs=epoch + 1)
        read = [key for key in found["read"] if key[0] == epoch]
        assert read
        for key in read:
            assert torch.equal(found["read"][key], alone["read"][key]), key


def test_plain_ddp_holds_one_table(tmp_path, processes):
    results = processes(2).run(squares, tmp_path, 2, shards=1)
    for name in ("current", "next"):
        assert torch.equal(results[0]["tables"][name], results[1]["tables"][name])
    assert results[0]["tables"]["next"].any()


def digits(folder, *callbacks, epochs=2):
    torch.manual_seed(SEED)
    module, control = tiny_diffusion(unet={"mid_block_type": None}), AntiGradientControl(0.9, num_bins=5)
    data = DigitsDataModule(40, batch_size=8)
    trainer = quiet_trainer(
        folder,
        callbacks=[control, *callbacks],
        max_epochs=epochs,
        limit_val_batches=0,
        logger=CSVLogger(folder, name=""),
    )
    trainer.fit(module, data)
    return module, trainer, data


def test_zero_changes_no_bit_and_keeps_no_table(tmp_path):
    off = ThresholdAwareAugmentation(0)
    module, _, data = digits(tmp_path / "a", off)
    without, *_ = digits(tmp_path / "b")
    assert_same_bits(state_of(module), state_of(without))
    assert off.state_dict() == {}
    assert data.magnitudes is None


def test_what_is_logged(tmp_path):
    _, trainer, data = digits(tmp_path, ThresholdAwareAugmentation(20, band=3.0), epochs=4)
    assert 0 < trainer.callback_metrics["augmentation/share"] < 1
    assert 1 <= trainer.callback_metrics["augmentation/magnitude"] <= 20
    columns = (tmp_path / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    for name in ("share", "magnitude"):
        assert any(column.startswith(f"augmentation/{name}/bin_") for column in columns)
    assert data.magnitudes is None  # the data are as before


def test_the_whole_method_runs_on_digits(tmp_path):
    torch.manual_seed(SEED)
    control, taa = AntiGradientControl(0.95, num_bins=3, decay=0.3), ThresholdAwareAugmentation(band=3.0)
    callbacks = [control, ParameterAveragingCallback(2, every_n_epochs=4), Redistribution(0.25), taa]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=4, limit_val_batches=0)
    trainer.fit(tiny_diffusion(), ShardedDataModule(DigitsDataModule(40, batch_size=8), 2, partition="iid"))
    assert trainer.callback_metrics["agc/moved"] > 0
    assert trainer.callback_metrics["augmentation/share"] > 0


# --- projects of one's own, and bad input ----------------------------------------------------------------------------


class OwnData(pl.LightningDataModule):
    def __init__(self, *, keep=True, fresh=False):
        super().__init__()
        self.keep, self.fresh = keep, fresh

    def setup(self, stage):
        if self.keep:
            self.images = Augmented(WithIndex([image for image, _ in map(Pictures().__getitem__, range(NUM))]))

    def train_dataloader(self):
        images = self.images if self.keep and not self.fresh else Augmented(Pictures())
        return DataLoader(images, batch_size=5, shuffle=True)


def test_a_data_module_of_ones_own(tmp_path):
    torch.manual_seed(SEED)
    taa = ThresholdAwareAugmentation(30, band=math.inf)
    module = Given()
    quiet_trainer(tmp_path, callbacks=[agc(), taa], max_epochs=3).fit(module, OwnData())
    images = Pictures().images
    assert any(not torch.equal(image, images[i]) for i, image in module.read[1])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(map(Pictures().__getitem__, range(NUM)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OwnData(keep=False), "expected a training set in lightning_iet.data.Augmented, as an attribute .* found none"),
        (
            OwnData(fresh=True),
            "expected the training loader to read lightning_iet.data.Augmented, but it reads another",
        ),
        (DataLoader(WithIndex(Pictures())), "expected a training set in lightning_iet.data.Augmented"),
        (DataLoader(Stream()), "expected a training set in lightning_iet.data.Augmented"),
        (
            DataLoader(WithIndex(Subset(Augmented(Pictures()), range(8)))),
            f"around the same samples, but got {NUM} and 8: Augmented lies within a subset. Put it around the subset.",
        ),
        (
            DataLoader(Augmented(Subset(WithIndex(Pictures()), range(8)))),
            f"around the same samples, but got 8 and {NUM}: WithIndex lies within a subset",
        ),
    ],
)
def test_data_that_are_not_augmented_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[agc(), ThresholdAwareAugmentation()], max_epochs=1).fit(Given(), data)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ([], "expected one AntiGradientControl with .*, but got 0 of them"),
        ([AntiGradientControl(0)], "expected one AntiGradientControl .* a threshold above 0, .* got a threshold of 0"),
        ([AntiGradientControl(criterion="record")], "expected one AntiGradientControl .* but got criterion='record'"),
    ],
)
def test_no_threshold_no_band(tmp_path, controls, message):
    callbacks = [*copy.deepcopy(controls), ThresholdAwareAugmentation()]
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Given(), DataLoader(Augmented(Pictures())))


def test_images_of_four_channels_and_cached_latents_are_refused(tmp_path):
    module, data = Colours(), Squares(channels=4, num_control=10)
    match = "Argument `ops` expected .* that suit images of 4 channels, but got all. Use some of Identity, "
    with pytest.raises(ValueError, match=match):
        quiet_trainer(tmp_path, callbacks=[agc(), ThresholdAwareAugmentation()], max_epochs=1).fit(module, data)

    class Latents(nn.Module):
        cache = "memory"

    module.latents = Latents()
    with pytest.raises(ValueError, match="Argument `cache_latents` expected 'none' with augmented images"):
        quiet_trainer(tmp_path, callbacks=[agc(), ThresholdAwareAugmentation()]).fit(module, DigitsDataModule(20))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_magnitude": 31}, "Argument `max_magnitude` expected an integer in 0 … 30, but got 31"),
        ({"band": 1.0}, "Argument `band` expected a number above 1, but got 1.0"),
        ({"sharpness": 0}, "Argument `sharpness` expected a number above 0, but got 0"),
        ({"num_ops": 0}, "Argument `num_ops` expected an integer ≥ 1, but got 0"),
        ({"ops": ["Blur"]}, "Argument `ops` expected some of Identity, .*, but got 'Blur'"),
        ({"at": "now"}, "Argument `at` expected one of 'next_draw', 'same_step', but got 'now'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ThresholdAwareAugmentation(**kwargs)


def test_magnitudes_of_another_training_set_are_no_way_to_go_on(tmp_path):
    taa = ThresholdAwareAugmentation()
    trainer = fit(tmp_path, Given(), agc(), taa, dataset=Augmented(Pictures()), epochs=1)
    trainer.save_checkpoint(tmp_path / "24.ckpt")
    torch.manual_seed(SEED)
    trainer = quiet_trainer(tmp_path, callbacks=[agc(), ThresholdAwareAugmentation()], max_epochs=2)
    data = DataLoader(Augmented(Pictures(20)), batch_size=5)
    with pytest.raises(ValueError, match=r"Argument `ckpt_path` expected a checkpoint with .* of 20 samples"):
        trainer.fit(Given(), data, ckpt_path=tmp_path / "24.ckpt", weights_only=True)


def test_other_settings_than_the_checkpoints_are_told(tmp_path, whole):
    with pytest.warns(UserWarning, match="other settings than the checkpoint's: max_magnitude 30 to 5"):
        squares(tmp_path, ckpt_path=whole[1] / "1-2.ckpt", magnitude=5)
