import csv
import itertools
import os

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

from lightning_iet import ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.interruptions import resume_from
from lightning_iet.data import DigitsDataModule
from lightning_iet.utilities.checkpoints import last_checkpoint
from tests.helpers.models import quiet_trainer, tiny_diffusion

clock = itertools.count(1_700_000_000)


def write(path, step=1, *, epoch=0, weights_only=False, ready=None, callbacks=None, at=None):
    """A file with what Lightning writes, as far as it matters here; each is newer than the one before."""
    batches = {"ready": step if ready is None else ready, "started": step, "processed": step, "completed": step - 1}
    loops = {"fit_loop": {"epoch_loop.batch_progress": {"current": batches}}}
    content = {"epoch": epoch, "global_step": step, "state_dict": {"w": torch.zeros(1000)}, "loops": loops}
    if not weights_only:
        content |= {"optimizer_states": [], "callbacks": callbacks or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    time = next(clock) if at is None else at
    os.utime(path, (time, time))
    return path


@pytest.fixture
def runs(tmp_path):
    """``runs(version)``: the folder of that version's checkpoints."""
    return lambda version: tmp_path / "runs" / "name" / f"version_{version}" / "checkpoints"


@pytest.fixture
def found(tmp_path):
    """The last checkpoint of a trainer that numbers its versions."""
    return lambda **kwargs: last_checkpoint(trainer_of(tmp_path, **kwargs))


def trainer_of(tmp_path, *, logger=None, callbacks=(), **kwargs):
    logger = CSVLogger(tmp_path / "runs", name="name") if logger is None else logger
    return quiet_trainer(
        tmp_path, logger=logger, callbacks=[ModelCheckpoint(), *callbacks], enable_checkpointing=True, **kwargs
    )


def test_without_one_the_run_starts_afresh_and_says_so(found, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    assert found() is None
    assert caplog.text.count("starts afresh") == 1


def test_the_newest_of_all_versions(found, runs, tmp_path):
    write(runs(0) / "last.ckpt", step=1000)
    newest = write(runs(1) / "last.ckpt", step=20)  # started afresh: less far, and yet what one wants to go on with
    write(tmp_path / "runs" / "another" / "version_7" / "checkpoints" / "last.ckpt")
    runs(2).mkdir(parents=True)  # killed before its first checkpoint
    assert found() == newest
    older = write(runs(0) / "epoch=0-step=3.ckpt")
    assert found() == older


def test_progress_decides_between_files_of_one_moment(found, runs):
    write(runs(0) / "epoch=9-step=9.ckpt", step=9, at=5)
    newest = write(runs(0) / "epoch=10-step=10.ckpt", step=10, at=5)
    write(runs(0) / "last.ckpt", step=8, at=5)
    assert found() == newest


@pytest.mark.parametrize("harm", ["torn", "empty", "damaged", "text"])
def test_a_harmed_file_is_named_and_the_one_before_is_used(found, runs, harm, caplog):
    before = write(runs(0) / "epoch=0-step=1.ckpt")
    path = write(runs(1) / "last.ckpt", step=2)
    content = bytearray(path.read_bytes())
    if harm == "damaged":
        content[len(content) // 2] ^= 1
    else:
        content = {"torn": content[:-30], "empty": b"", "text": b"hello"}[harm]
    path.write_bytes(bytes(content))
    assert found() == before
    assert "Passed over: Argument `ckpt_path` expected a whole" in caplog.text
    assert str(path) in caplog.text


def test_a_file_with_code_stops_the_run_and_runs_nothing(found, runs, tmp_path):
    path = write(runs(1) / "last.ckpt", step=2)
    torch.save({"state_dict": Evil(tmp_path / "evil")}, path)
    with pytest.raises(ValueError, match=r"its `state_dict` is a posix\.mkdir") as error:
        found()
    assert str(path) in str(error.value)
    assert not (tmp_path / "evil").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_cut_off_at_any_place_is_never_taken(found, runs):
    before = write(runs(0) / "epoch=0-step=1.ckpt")
    path = write(runs(0) / "last.ckpt", step=2)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        assert found() == before


def test_weights_alone_are_nothing_to_go_on_from(found, runs, caplog):
    before = write(runs(0) / "epoch=0-step=1.ckpt")
    write(runs(0) / "weights.ckpt", weights_only=True)
    assert found() == before
    assert not caplog.records


def test_what_was_written_while_a_step_broke_off_is_passed_over(found, runs, caplog):
    before = write(runs(0) / "epoch=0-step=1.ckpt", step=1)
    write(runs(0) / "epoch=0-step=2.ckpt", step=2, ready=3)
    assert found() == before
    assert "in the middle of a step" in caplog.text


def test_what_holds_no_shards_is_passed_over_where_there_are_shards(found, runs, caplog):
    shards = {"ParameterAveragingCallback": {"shards": {}}}
    before = write(runs(0) / "epoch=0-step=1.ckpt", callbacks=shards)
    newest = write(runs(0) / "epoch=0-step=2.ckpt")
    assert found(callbacks=[ParameterAveragingCallback(4)]) == before
    assert "holds none of the 4 shards" in caplog.text
    assert found(callbacks=[ParameterAveragingCallback(1)]) == newest
    assert found() == newest


def test_unfinished_files_are_none(found, runs):
    before = write(runs(0) / "last.ckpt")
    write(runs(0) / ".last.ckpt.host.1.unfinished")
    assert found() == before


def test_a_callback_with_a_folder_of_its_own(found, runs, tmp_path):
    write(runs(0) / "last.ckpt")
    own = write(tmp_path / "own" / "last.ckpt")
    callback = ModelCheckpoint(tmp_path / "own", every_n_train_steps=1)
    assert found(callbacks=[callback]) == own
    newest = write(runs(1) / "last.ckpt")
    assert found(callbacks=[callback]) == newest


def test_without_a_logger(found, tmp_path):
    assert found(logger=False) is None
    path = write(tmp_path / "checkpoints" / "last.ckpt")
    assert found(logger=False) == path


def test_other_loggers(found, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    numbered = write(tmp_path / "tb" / "name" / "version_3" / "checkpoints" / "last.ckpt")
    assert found(logger=TensorBoardLogger(tmp_path / "tb", name="name")) == numbered
    mine = write(tmp_path / "csv" / "name" / "mine" / "checkpoints" / "last.ckpt")
    write(tmp_path / "csv" / "name" / "other" / "checkpoints" / "last.ckpt")
    assert found(logger=CSVLogger(tmp_path / "csv", name="name", version="mine")) == mine
    by_id = write(tmp_path / "wandb" / "project" / "abc" / "checkpoints" / "last.ckpt")
    assert found(logger=WandbLogger(save_dir=tmp_path / "wandb", project="project", id="abc")) == by_id
    assert found(logger=WandbLogger(save_dir=tmp_path / "wandb", project="project")) is None


def test_a_file_that_vanishes_meanwhile_is_no_error(found, runs):
    path = write(runs(0) / "last.ckpt")
    (runs(0) / "gone.ckpt").symlink_to(runs(0) / "nowhere.ckpt")
    assert found() == path


@pytest.mark.filterwarnings("ignore:.*(exists and is not empty|not resumable|dirpath has changed).*:UserWarning")
@pytest.mark.parametrize("logged", [True, False])
def test_python_users_start_and_go_on_with_one_program(tmp_path, logged):
    def train(max_epochs):
        trainer = quiet_trainer(
            tmp_path,
            logger=CSVLogger(tmp_path / "runs", name="name") if logged else False,
            callbacks=[ParameterAveragingCallback(2, every_n_epochs=2), ModelCheckpoint(save_last=True)],
            enable_checkpointing=True,
            max_epochs=max_epochs,
            limit_val_batches=0,
            log_every_n_steps=1,
        )
        data = ShardedDataModule(DigitsDataModule(8, batch_size=4), 2, partition="iid")
        start = last_checkpoint(trainer)
        trainer.fit(tiny_diffusion(), data, ckpt_path=start, weights_only=True)
        return start, trainer.global_step

    assert train(1) == (None, 2)
    start, steps = train(3)
    assert start is not None
    assert steps == 6
    if logged:  # a new version: nothing is written over, and the logged steps go on
        for version, steps in enumerate([range(3), range(2, 7)]):
            with (tmp_path / f"runs/name/version_{version}/metrics.csv").open() as file:
                assert {int(row["step"]) for row in csv.DictReader(file)} <= set(steps)


def start_together(tmp_path, starts):
    rank = int(os.environ["RANK"])
    trainer = quiet_trainer(tmp_path, devices=2, strategy="ddp", max_epochs=2, limit_val_batches=0)
    data = DigitsDataModule(8, batch_size=4)
    try:
        trainer.fit(tiny_diffusion(), data, ckpt_path=resume_from(trainer, starts[rank]), weights_only=True)
    except Exception as error:
        return str(error)
    return "trained"


def test_processes_that_found_different_checkpoints_refuse_all_together(tmp_path, processes):
    one, other = tmp_path / "one.ckpt", tmp_path / "other.ckpt"
    for path, steps in ((one, 1), (other, 2)):
        trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=steps, limit_val_batches=0)
        trainer.fit(tiny_diffusion(), DigitsDataModule(8, batch_size=4))
        trainer.save_checkpoint(path)
    for starts in ((one, other), (None, other)):
        results = processes(2).run(start_together, tmp_path, starts)
        assert results[0] == results[1]
        first = f"'{one}' of step 1" if starts[0] else "none"
        assert f"same last checkpoint, but got {first} on process 0 and '{other}' of step 2 on process 1" in results[0]
    assert processes(2).run(start_together, tmp_path, (one, one)) == ["trained", "trained"]


def test_where_none_can_be_used_the_run_does_not_start_afresh(found, runs):
    path = write(runs(0) / "last.ckpt")
    path.write_bytes(path.read_bytes()[:-30])
    other = write(runs(0) / "epoch=0-step=2.ckpt", step=2, ready=3)
    with pytest.raises(
        ValueError, match=r"none of the 2 that the run has can be used\. The newest: '.*last\.ckpt'"
    ) as error:
        found()
    assert "cut off or no checkpoint. To start afresh" in str(error.value)
    assert "remove them or give the run another name" in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"none of the 1 .*in the middle of a step") as error:
        found()
    assert str(other) in str(error.value)


def test_weights_alone_are_no_reason_to_stop(found, runs):
    write(runs(0) / "weights.ckpt", weights_only=True)
    assert found() is None


@pytest.mark.parametrize("value", [np.float64(0.5), np.array([0.2]), OmegaConf.create({"a": [1]})])
def test_plain_hyperparameters_are_read(found, runs, value):
    path = write(runs(0) / "last.ckpt", callbacks={"settings": value})
    assert found() == path


def test_what_cannot_be_read_stops_the_run_though_an_older_file_can(found, runs, tmp_path):
    write(runs(0) / "epoch=0-step=1.ckpt")
    path = write(runs(0) / "last.ckpt", step=2, callbacks={"loss": torch.nn.MSELoss()})
    with pytest.raises(ValueError, match=r"its `callbacks\.loss` is a torch\.nn\.modules\.loss\.MSELoss") as error:
        found()
    assert str(path) in str(error.value)
    assert last_checkpoint(trainer_of(tmp_path), trusted=True) == path
