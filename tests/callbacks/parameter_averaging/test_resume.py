"""A run that is cut at any step and goes on, also on other processes, ends in the same bits as one that was not."""

import functools
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint

from lightning_iet import AntiGradientControl, DiffusionModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.data import DigitsDataModule
from tests.helpers.models import Memory, quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

SEED, EPOCHS, STEPS = 11, 3, 8  # 4 shards take 2 steps each in an epoch
ROUNDS = {"epochs": {"every_n_epochs": 2}, "steps": {"every_n_train_steps": 3}}

# Where runs are cut, by the number of processes that go on. On one process: at the end of a shard's turn, at the end of
# an epoch in all three places, in the step after which an averaging comes and in the next one, and in the last step. On
# several: where processes have unequal parts of the epoch before them, within the first turn of a shard; the tests
# below cut where one only waits, and late in the run.
CUTS = {
    ("epochs", 1): ["1-4-step", "1-8-step", "1-8-end"],
    ("steps", 1): ["0-8-validation", "1-4-step", "1-5-step", "2-8-step"],
    ("epochs", 2): ["0-3-step", "1-8-validation"],
    ("steps", 2): ["0-7-step"],
    ("steps", 4): ["1-6-step"],
}


class Flips(torch.utils.data.Dataset):
    """Images, flipped at random."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label, number = self.images[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), label, number


class Flipped(DigitsDataModule):
    """Digits with random flips."""

    def setup(self, stage):
        super().setup(stage)
        self.train_set = Flips(self.train_set)


class Save(Checkpoint):
    """Saves after some steps (``EPOCH-BATCH-step``; ``-weights`` for them alone), validations and epochs (``-end``)."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def save(self, trainer, kind, **kwargs):
        name = f"{trainer.current_epoch}-{trainer.fit_loop.epoch_loop.batch_idx + 1}-{kind}"
        if name in self.names:
            trainer.save_checkpoint(self.folder / name, **kwargs)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "step")
        self.save(trainer, "weights", weights_only=True)

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "end")


class StopAt(pl.Callback):
    """Ends the run within an epoch, as a limit of time does."""

    def __init__(self, epoch, batch_idx):
        self.at = epoch, batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.should_stop = True


def run(
    folder,
    world_size=1,
    *,
    ckpt_path=None,
    save_to=None,
    names=(),
    num_workers=0,
    epochs=EPOCHS,
    rounds="epochs",
    offload="none",
    stop_at=None,
    **kwargs,
):
    """Train; returns all that makes a model's future: weights, EMA, optimizer states and loss banks of shards."""
    torch.manual_seed(SEED)
    module = tiny_diffusion(warmup_steps=5, unet={"dropout": 0.1, "mid_block_type": None})
    averaging = Kept(4, offload=offload, **ROUNDS[rounds])
    agc, logger = AntiGradientControl(0.5), Memory()
    callbacks = [agc, averaging]
    trainer = quiet_trainer(
        folder,
        logger=logger,
        log_every_n_steps=1,
        callbacks=callbacks + ([StopAt(*stop_at)] if stop_at else []) + ([Save(save_to, names)] if save_to else []),
        max_epochs=epochs,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=1,
        val_check_interval=1.0,
        num_sanity_val_steps=0,
        enable_checkpointing=save_to is not None,
        **kwargs,
    )
    data = Flipped(26, batch_size=4, num_workers=num_workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*yielded None.*")
        trainer.fit(module, ShardedDataModule(data, 4, partition="iid"), ckpt_path=ckpt_path, weights_only=True)
    return {
        "model": state_of(module),
        "shards": averaging.final,
        "global_step": trainer.global_step,
        "gaps": agc.gap_history.rows,
        "seen": int(agc.run_statistics.seen.sum()),
        "logged": {
            epoch: {name: float(value) for name, value in values.items() if name.startswith(("agc/", "shard_"))}
            for epoch, values in enumerate(logger.epochs)
        },
    }


class Kept(ParameterAveragingCallback):
    """Keeps the shards as they are when training ends (None where there was nothing left to train)."""

    final = None

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.final = self.state_dict()["shards"]
        if trainer.global_rank:
            self.final = {}


def flatten(thing, name=""):
    """Every tensor and number of nested containers, by its path."""
    if isinstance(thing, dict):
        return {k: v for key, value in thing.items() for k, v in flatten(value, f"{name}/{key}").items()}
    if isinstance(thing, list | tuple):
        return flatten(dict(enumerate(thing)), name)
    return {name: thing if isinstance(thing, torch.Tensor) else torch.tensor(float(thing or 0))}


def same(resumed, expected):
    assert_same_bits(resumed["model"], expected["model"])
    if resumed["shards"] is not None:
        assert_same_bits(flatten(resumed["shards"]), flatten(expected["shards"]))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, _pools):
    """``uncut(rounds)``: what is left of a run that is never cut, on one process, and the folder of its checkpoints."""
    from tests.helpers.distributed import Processes

    @functools.cache
    def get(rounds):
        pool = _pools.setdefault(1, Processes(1)) if 1 not in _pools or not _pools[1].alive else _pools[1]
        folder = tmp_path_factory.mktemp(rounds)
        names = {
            "1-5-step",
            "1-7-step",
            "2-4-step",
            "2-5-step",
            *(name for (kind, _), names in CUTS.items() if kind == rounds for name in names),
        }
        (result,) = pool.run(run, folder, save_to=folder, names=names, rounds=rounds)
        return result, folder

    return get


def resume_from_all(folder, world_size, names, **settings):
    return [run(folder, world_size, ckpt_path=folder / name, **settings) for name in names]


@pytest.mark.parametrize(("rounds", "name"), [("epochs", "2-4-step"), ("steps", "2-5-step")])
def test_states_that_are_away_come_back_after_a_cut_on_other_processes(uncut, processes, rounds, name):
    """Cut in the last epoch after whole shards: on two processes, one of them only waits for the other."""
    expected, folder = uncut(rounds)
    for (resumed,) in processes(2).run(resume_from_all, folder, 2, [name], rounds=rounds, offload="cpu"):
        assert_same_bits(resumed["model"], expected["model"])


@pytest.mark.parametrize(("rounds", "world_size"), CUTS)
def test_a_run_cut_anywhere_ends_in_the_same_bits(uncut, rounds, world_size, processes):
    expected, folder = uncut(rounds)
    names = CUTS[rounds, world_size]
    results = processes(world_size).run(resume_from_all, folder, world_size, names, rounds=rounds)
    for name, resumed, *others in zip(names, *results, strict=True):
        try:
            same(resumed, expected)
            for other in others:  # also where processes wait
                assert other["global_step"] == resumed["global_step"]
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_a_run_in_which_the_first_process_waited_is_cut_again(uncut, tmp_path, processes):
    """Cut where the first process has no shard left, then on two within an epoch, and on one at its end."""
    expected, folder = uncut("epochs")
    names = ["1-3-step", "1-4-step"]
    settings = {"ckpt_path": folder / "1-5-step", "save_to": tmp_path, "names": names}
    first, _ = processes(2).run(run, tmp_path, 2, **settings)
    same(first, expected)
    for world_size, chosen in ((1, names[1:]), (2, names[:1])):
        results = processes(world_size).run(resume_from_all, tmp_path, world_size, chosen)[0]
        for name, resumed in zip(chosen, results, strict=True):
            try:
                same(resumed, expected)
                assert len(resumed["gaps"]) == EPOCHS
            except AssertionError as error:
                raise AssertionError(f"{name} on {world_size}: {error}") from error


def test_a_run_of_several_processes_goes_on_in_one(uncut, tmp_path, processes):
    expected, _ = uncut("epochs")
    names = ["1-2-step", "1-4-end"]  # of 4 steps of each process
    processes(2).run(run, tmp_path, 2, save_to=tmp_path, names=names, epochs=2)
    (results,) = processes(1).run(resume_from_all, tmp_path, 1, names)
    for resumed in results:
        same(resumed, expected)


def test_workers_read_the_right_samples_after_a_cut(uncut, processes):
    expected, folder = uncut("epochs")
    (resumed,) = processes(1).run(run, folder, ckpt_path=folder / "1-7-step", num_workers=2)
    same(resumed, expected)


@pytest.mark.parametrize(
    ("rounds", "epoch", "batch", "cuts"),
    [("epochs", 1, 2, [("validation", 0), ("end", 1)]), ("steps", 2, 5, [("step", 0)])],
)
def test_a_run_that_stopped_within_an_epoch_goes_on_in_its_middle(
    uncut, tmp_path, processes, rounds, epoch, batch, cuts
):
    """From every checkpoint of its end, also the one after the hooks of the epoch's end; with workers and without."""
    expected, _ = uncut(rounds)
    names = [f"{epoch}-{batch + 1}-{kind}" for kind, _ in cuts]
    settings = {"save_to": tmp_path, "names": names, "rounds": rounds}
    (stopped,) = processes(1).run(run, tmp_path, stop_at=(epoch, batch), **settings)
    assert len(stopped["gaps"]) == epoch + 1
    assert stopped["seen"] < expected["seen"] == EPOCHS * 26
    for name, (_, workers) in zip(names, cuts, strict=True):
        (resumed,) = processes(1).run(run, tmp_path, ckpt_path=tmp_path / name, num_workers=workers, rounds=rounds)
        try:
            assert resumed["global_step"] == EPOCHS * STEPS
            same(resumed, expected)
            assert torch.equal(resumed["gaps"], expected["gaps"])
            for later in range(epoch, EPOCHS):
                assert resumed["logged"][later] == expected["logged"][later]
        except AssertionError as error:
            raise AssertionError(f"{name}, {workers} workers: {error}") from error


def test_checkpoints_show_the_average_in_mid_round(tmp_path):
    """Also those of weights alone; and they load without our callback."""
    names = ["0-5-step", "0-5-weights"]
    run(tmp_path, save_to=tmp_path, names=names, epochs=1)
    for name in names:
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        if name.endswith("step"):
            shards = checkpoint["callbacks"]["Kept"]["shards"]
            flats = [shard["flat"]["float32"].double() for shard in shards.values()]
            sizes = [7, 7, 6, 6]
            expected = sum(n * flat for n, flat in zip(sizes, flats, strict=True)) / 26
            weight = checkpoint["state_dict"]["unet.conv_in.weight"]
            torch.testing.assert_close(weight.flatten().double(), expected[: weight.numel()], rtol=1e-5, atol=1e-6)
            assert not torch.equal(flats[0], flats[1])
            full = checkpoint["state_dict"]
        else:
            assert_same_bits(checkpoint["state_dict"], full)
        loaded = DiffusionModule.load_from_checkpoint(tmp_path / name)
        assert_same_bits(loaded.state_dict(), dict(checkpoint["state_dict"]))
        for tensor in checkpoint["state_dict"].values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(folder, save_to=folder, names=["0-3-step"], epochs=1)
    return folder / "0-3-step"


def go_on(tmp_path, checkpoint, *, num_shards=4, data=None, module=None, split_seed=0, **kwargs):
    averaging = Kept(num_shards, **({"every_n_epochs": 2} | kwargs))
    trainer = quiet_trainer(tmp_path, callbacks=[AntiGradientControl(0.5), averaging], max_epochs=2)
    data = ShardedDataModule(data or Flipped(26, batch_size=4), num_shards, partition="iid", seed=split_seed)
    module = module or tiny_diffusion(warmup_steps=5, unet={"mid_block_type": None})
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_shards": 2}, "number of shards 4, but got 2"),
        ({"num_shards": 1}, "number of shards 4, but got 1"),
        ({"split_seed": 1}, "the split '?[0-9a-f]{12}'?, but got"),
        ({"data": Flipped(27, batch_size=4)}, r"the shard weights \[7, 7, 6, 6\], but got \[7, 7, 7, 6\]"),
        ({"data": Flipped(26, batch_size=4, seed=1)}, "the training data '?[0-9a-f]{12}'?, but got"),
        ({"data": Flipped(26, batch_size=2)}, "the steps of each shard in an epoch 2, but got 4"),
        ({"every_n_epochs": 3}, "the length of a round 2 epochs.*but got 3 epochs"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path, checkpoint, kwargs, message):
    with pytest.raises(MisconfigurationException, match=message):
        go_on(tmp_path, checkpoint, **kwargs)


def test_another_model_is_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"another architecture, but got \d+ of \d+ weights that differ"):
        go_on(tmp_path, checkpoint, module=tiny_diffusion(warmup_steps=5, unet={"block_out_channels": (16,)}))


def test_a_plain_checkpoint_is_a_common_start(tmp_path, caplog):
    torch.manual_seed(SEED)
    plain = tiny_diffusion(seed=4)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(plain, Flipped(24, batch_size=4))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(state_of(pl_module))

    averaging = ParameterAveragingCallback(4)
    trainer = quiet_trainer(tmp_path, callbacks=[averaging, Look()], max_epochs=2, limit_val_batches=0)
    data = ShardedDataModule(Flipped(24, batch_size=4), 4, partition="iid")
    trainer.fit(tiny_diffusion(), data, ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert "holds no shards" in caplog.text
    assert len(seen) == STEPS
    for first_step_of_a_shard in (0, 2, 4, 6):
        assert_same_bits(seen[first_step_of_a_shard], state_of(plain))
