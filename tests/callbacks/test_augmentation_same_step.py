"""Augmentation in the same step, against a walk by hand: each batch is judged, then trained on with other noise."""

import math
import warnings
from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_iet import (
    AntiGradientControl,
    DigitsDataModule,
    ParameterAveragingCallback,
    ShardedDataModule,
    ThresholdAwareAugmentation,
)
from lightning_iet.data import WithIndex
from lightning_iet.data.augmentation import augment
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import isolated_rng
from tests.helpers.interrupted import SEED, Saves, train_on_shards
from tests.helpers.models import Pictures, quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

THRESHOLD, DECAY, TIMESTEPS, NUM, RATE = 0.8, 0.8, 3, 24, 0.01
NAMES = ("0-1", "1-1", "1-2", "1-3", "2-0", "2-validated")  # of checkpoints from which runs go on


class Noisy(pl.LightningModule):
    """Its losses depend on its weight, the images, and random numbers; it notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.steps = []

    def training_step(self, batch, batch_idx):
        images, index = batch[0], batch[-1]
        losses, timesteps = losses_of(self.weight, images, torch.rand(len(images), 2, dtype=torch.float64))
        if torch.is_grad_enabled():
            with isolated_rng():  # what was drawn above is read from the generator, which is put back
                self.steps.append((self.current_epoch, index.tolist(), images.clone(), losses.detach().clone()))
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def losses_of(weight, images, draws):
    base = 0.6 + 0.4 * draws[:, 0] + 0.02 * images.double().sum((1, 2, 3))
    return weight * base, (draws[:, 1] * TIMESTEPS).long()


class Watch(AntiGradientControl):
    """Notes which samples it keeps."""

    def select(self, sample_loss, timesteps):
        selection = super().select(sample_loss, timesteps)
        self.kept = [*getattr(self, "kept", []), selection.keep.tolist()]
        return selection


def as_tuple(samples):
    images, index = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(index)


@pytest.mark.parametrize("collate", [None, as_tuple])  # batches that are lists, and tuples, which cannot be changed
def test_equals_a_walk_by_hand(tmp_path, collate):
    data, module, control = Pictures(), Noisy(), Watch(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1)
    control.load_shard_state({"bank": torch.zeros(TIMESTEPS, dtype=torch.float64)})
    torch.manual_seed(SEED)
    taa = ThresholdAwareAugmentation(at="same_step")
    trainer = quiet_trainer(tmp_path, callbacks=[control, taa], max_epochs=4)
    trainer.fit(module, DataLoader(data, batch_size=5, shuffle=True, collate_fn=collate))

    bank, weight, seen, skipped = [0.0] * TIMESTEPS, 1.0, defaultdict(int), defaultdict(int)
    shares = defaultdict(list)
    for (epoch, index, shown, losses), keep in zip(module.steps, control.kept, strict=True):
        clean = data.images[index]
        with isolated_rng(seed=derive_seed(SEED, epoch, index[0], 4)):
            draws = torch.rand(len(index), 2, dtype=torch.float64)
        judged, timesteps = losses_of(weight, clean, draws)
        judged, timesteps = judged.tolist(), timesteps.tolist()
        for row, (i, loss, t) in enumerate(zip(index, judged, timesteps, strict=True)):
            limit = THRESHOLD * bank[t]
            ratio = loss / limit if limit else math.inf
            magnitude = math.floor(5 * math.exp(-5 * (ratio - 1))) if 1 <= ratio < 1.5 else 0
            assert torch.equal(shown[row], augment(data.images[i], magnitude, seed=derive_seed(SEED, epoch, i, 2)))
            assert keep[row] == (loss >= limit)
            seen[i], skipped[i] = seen[i] + 1, skipped[i] + (loss < limit)
            shares[epoch].append(magnitude > 0)
        for loss, t in zip(judged, timesteps, strict=True):
            bank[t] = DECAY * bank[t] + (1 - DECAY) * loss
        kept = [loss / weight for loss, is_kept in zip(losses.tolist(), keep, strict=True) if is_kept]
        weight -= RATE * sum(kept) / max(1, len(kept))
    assert module.weight.item() == pytest.approx(weight, rel=1e-9)
    assert control.bank.tolist() == pytest.approx(bank, rel=1e-9)
    assert control.counts.seen.tolist() == [seen[i] for i in range(NUM)]
    assert control.counts.skipped.tolist() == [skipped[i] for i in range(NUM)]
    assert sum(skipped.values()) > 0
    assert trainer.callback_metrics["augmentation/share"] == pytest.approx(sum(shares[3]) / NUM)
    assert 0 < sum(map(sum, shares.values())) < 4 * NUM
    assert torch.equal(data.images, Pictures().images)  # what the loader reads is left alone


class InMemory(Dataset):
    """Yields whole batches as tuples: views of one tensor, or tensors that it yields again in the next epoch."""

    def __init__(self, is_view):
        data = Pictures()
        self.images, self.index, self.is_view = data.images, torch.arange(NUM), is_view
        self.whole = self.images, self.index

    def __len__(self):
        return NUM

    def __getitem__(self, rows):
        return (self.images[rows], self.index[rows]) if self.is_view else self.whole


@pytest.mark.parametrize("is_view", [True, False])
def test_a_training_set_in_memory_stays_as_it_is(tmp_path, is_view):
    data, module = InMemory(is_view), Noisy()
    rows = [slice(0, 12), slice(12, NUM)] if is_view else [slice(NUM)]
    torch.manual_seed(SEED)
    control = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, decay=DECAY, sample_index=-1)
    trainer = quiet_trainer(tmp_path, callbacks=[control, ThresholdAwareAugmentation(at="same_step")], max_epochs=3)
    trainer.fit(module, DataLoader(data, batch_size=None, sampler=rows, collate_fn=lambda batch: batch))
    clean = Pictures().images
    assert any(not torch.equal(shown, clean[index]) for _, index, shown, _ in module.steps)
    assert torch.equal(data.images, clean)


def test_training_draws_what_it_would_without_it(tmp_path):
    drawn = []
    for callbacks in ([], [ThresholdAwareAugmentation(at="same_step")]):
        module = Noisy()
        torch.manual_seed(SEED)
        control = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, sample_index=-1)
        trainer = quiet_trainer(tmp_path, callbacks=[control, *callbacks], max_epochs=2)
        trainer.fit(module, DataLoader(Pictures(), batch_size=5, shuffle=True))
        drawn.append((module.steps, torch.get_rng_state()))
    (steps, state), (others, other) = drawn
    assert [step[:2] for step in steps] == [step[:2] for step in others]
    assert torch.equal(steps[0][3], others[0][3])  # of the first batch, which an empty bank leaves as it is
    assert torch.equal(state, other)


# --- shards: processes, replicas, interruptions ----------------------------------------------------------------------


def digits(folder, world_size=1, *, ckpt_path=None, save=None, names=NAMES, magnitude=10, epochs=3):
    """Weights, bank and counts of a run on two shards, with dropout in the judgement too."""
    control = AntiGradientControl(0.9, num_bins=3, decay=0.3)
    taa = ThresholdAwareAugmentation(magnitude, band=3.0, at="same_step")
    callbacks = [control, taa, ParameterAveragingCallback(2, every_n_epochs=2)]
    options = {"batch_size": 8, "epochs": epochs, "world_size": world_size, "ckpt_path": ckpt_path}
    saves = save and Saves(save, names)
    module, trainer = train_on_shards(folder, callbacks, 32, 2, **options, saves=saves, limit_val_batches=1)
    share = float(trainer.callback_metrics["augmentation/share"])
    return {"model": state_of(module), "tables": {"counts": control.counts.shared.clone()}, "share": share}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return digits(folder, save=folder), folder


def assert_equal(found, whole):
    assert_same_bits(found["model"], whole["model"])
    assert_same_bits(found["tables"], whole["tables"])
    assert found["share"] == pytest.approx(whole["share"])


@pytest.mark.parametrize("name", ["0-1", "1-3", "2-validated"])
def test_a_run_goes_on_from_any_step_bit_for_bit(tmp_path, whole, name):
    assert 0 < whole[0]["share"] < 1
    assert_equal(digits(tmp_path, ckpt_path=whole[1] / f"{name}.ckpt"), whole[0])


def test_the_number_of_processes_changes_nothing(tmp_path, processes, whole):
    for found in processes(2).run(digits, tmp_path, 2, save=tmp_path, names=["2-0"]):
        assert_equal(found, whole[0])
    # What is logged of an epoch that was cut counts the draws of both processes.
    assert_equal(digits(tmp_path, ckpt_path=tmp_path / "2-0.ckpt"), whole[0])


def test_replicas_hold_the_same(tmp_path, processes):
    first, *others = processes(4).run(digits, tmp_path, 4, epochs=2)
    assert first["tables"]["counts"][0].sum() == 2 * 32
    assert first["share"] > 0
    for found in others:
        assert_equal(found, first)


# --- what cannot work ------------------------------------------------------------------------------------------------


class Normalized(Noisy):
    """A layer that learns from every batch that it sees."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def training_step(self, batch, batch_idx):
        self.norm(batch[0])
        return super().training_step(batch, batch_idx)


class Unadapted(Noisy):
    """Returns nothing but the mean of its losses."""

    def __init__(self):
        super().__init__()
        self.denoiser = nn.Linear(16, 16)

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        return (self.denoiser(images) - torch.rand_like(images)).square().mean()


class Manual(Noisy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Normalized, Pictures(), r"for at='same_step', but it changed `norm.running_mean`.* or use at='next_draw'"),
        (Unadapted, Pictures(), r"for at='same_step', but it showed no losses. Give the module a `loss_reducer`, or"),
        (Manual, Pictures(), r"but it takes optimizer steps itself"),
        (Noisy, Pictures(scale=2.0), r"Argument `image` expected values in \[0, 1\], .* normalize in the step, or use"),
        (Noisy, [torch.rand(1, 4, 4) for _ in range(9)], "expected batches with the index of each sample"),
        (Noisy, WithIndex([torch.rand(5) for _ in range(9)]), r"expected images, a tensor of shape \(5, C, H, W\)"),
    ],
)
def test_what_cannot_be_judged_or_augmented_is_refused(tmp_path, module, data, message):
    control = AntiGradientControl(
        THRESHOLD, num_timesteps=TIMESTEPS, sample_index=-1 if isinstance(data, Pictures) else None
    )
    trainer = quiet_trainer(tmp_path, callbacks=[control, ThresholdAwareAugmentation(at="same_step")], max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(), DataLoader(data, batch_size=5))


@pytest.mark.parametrize("name", ["denoiser", "timestep"])
def test_losses_that_hooks_find_are_refused(tmp_path, name):
    """Where a module's losses are is tested by the backward pass of the first step, which a judgement comes before."""
    control = AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, sample_index=-1, **{name: "denoiser"})
    trainer = quiet_trainer(tmp_path, callbacks=[control, ThresholdAwareAugmentation(at="same_step")], max_epochs=1)
    with pytest.raises(ValueError, match=f"`at` expected 'next_draw' .* but got 'same_step', and `{name}` of AntiGr"):
        trainer.fit(Unadapted(), DataLoader(Pictures(), batch_size=5))


def test_nothing_is_deferred():
    with pytest.raises(ValueError, match="Argument `defer` expected False with at='same_step'"):
        ThresholdAwareAugmentation(at="same_step", defer=True)


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_step_that_skips_a_batch_skips_its_judgement(tmp_path, skipped):
    class Skips(Noisy):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    module, control = Skips(), AntiGradientControl(THRESHOLD, num_timesteps=TIMESTEPS, sample_index=-1)
    trainer = quiet_trainer(tmp_path, callbacks=[control, ThresholdAwareAugmentation(at="same_step")], max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step.*returned.*None.*")
        trainer.fit(module, DataLoader(Pictures(), batch_size=4))
    assert control.counts.seen.sum() == NUM - 4


def test_other_moments_than_the_checkpoints_are_told_and_work(tmp_path, whole):
    torch.manual_seed(SEED)
    control, taa = AntiGradientControl(0.9, num_bins=3, decay=0.3), ThresholdAwareAugmentation(10, band=3.0)
    callbacks = [control, taa, ParameterAveragingCallback(2, every_n_epochs=2)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=3, limit_val_batches=0)
    data = ShardedDataModule(DigitsDataModule(32, batch_size=8), 2, partition="iid")
    module = tiny_diffusion(unet={"dropout": 0.1, "mid_block_type": None})  # as of train_on_shards
    with pytest.warns(UserWarning, match="other settings than the checkpoint's: at 'same_step' to 'next_draw'"):
        trainer.fit(module, data, ckpt_path=whole[1] / "1-1.ckpt", weights_only=True)
    assert trainer.current_epoch == 3
