import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_iet.utilities.files import (
    check_writable,
    checkpoint_of,
    free_folder,
    printable,
    remedies,
    run_folder,
    whole_folder,
    write_atomically,
    write_csv,
    write_json,
)
from tests.helpers.models import quiet_trainer


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger], ids=["csv", "tensorboard"])
def test_run_folder_is_that_of_the_checkpoints_and_new_for_each_run(tmp_path, make_logger):
    for run in range(2):
        checkpoint = ModelCheckpoint()
        trainer = quiet_trainer(
            tmp_path,
            logger=make_logger(tmp_path, name="digits"),
            callbacks=[checkpoint],
            enable_checkpointing=True,
            limit_train_batches=1,
            limit_val_batches=0,
            log_every_n_steps=1,
            max_epochs=1,
        )
        trainer.fit(BoringModel())
        assert run_folder(trainer) == tmp_path / "digits" / f"version_{run}"
        assert Path(checkpoint.best_model_path).parent == run_folder(trainer) / "checkpoints"


def test_run_folder_of_weights_and_biases_is_project_and_run_id(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, project="digits", id="abc123", offline=True)
    assert run_folder(Trainer(logger=logger, accelerator="cpu")) == tmp_path / "digits" / "abc123"


def test_run_folder_without_logger_is_the_root(tmp_path):
    assert run_folder(quiet_trainer(tmp_path)) == tmp_path
    assert run_folder(quiet_trainer(tmp_path, fast_dev_run=True)) == tmp_path


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b", argument="out", remedy="")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_names_argument_folder_and_remedy_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"Argument `out` expected a folder .*, but got '.*file/runs' .* Use --out"
    ) as error:
        check_writable(tmp_path / "file" / "runs", argument="out", remedy="Use --out.")
    assert "\n" not in str(error.value)


def test_write_atomically_replaces_the_file_only_at_the_end(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")
    with write_atomically(target) as unfinished:
        unfinished.write_text("new")
        assert target.read_text() == "old"
        assert unfinished.suffix == ".json"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
    assert target.read_text() == "new"


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")

    def fail():
        with write_atomically(target) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
    assert target.read_text() == "old"


def test_tables_and_json_are_whole_or_not_there(tmp_path):
    write_csv(tmp_path / "a.csv", [{"run": "one", "fid": 1.5}, {"run": "two, é", "mq": 0.25}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines() == [
        "run,fid,mq", "one,1.5,", '"two, é",,0.25',
    ]  # fmt: skip
    content = {"a": [1, 2.5, float("inf")], "b": ("x", None), "c": {"nan": float("nan")}, "d": True}
    write_json(tmp_path / "a.json", content)
    expected = {"a": [1, 2.5, None], "b": ["x", None], "c": {"nan": None}, "d": True}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.csv", "a.json"}


NAMES = st.binary(min_size=1).map(lambda data: data.decode("utf-8", "surrogateescape"))


@given(NAMES)
def test_any_file_name_becomes_one_line_of_utf_8(name):
    shown = printable(name)
    assert shown.encode("utf-8")
    assert len(shown.splitlines()) == 1
    assert shown.isprintable()


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_readable_names_stay_as_they_are(name):
    assert printable(name) == name


def test_marks_that_turn_writing_around_are_shown():
    assert printable("a\u202egnp.exe") == "a\\u202egnp.exe"


def touch(path, time):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (time, time))
    return path


def test_the_newest_version_that_has_a_checkpoint_counts(tmp_path):
    touch(tmp_path / "version_9/checkpoints/last.ckpt", 9)
    newest = touch(tmp_path / "version_10/checkpoints/last.ckpt", 3)
    touch(tmp_path / "version_10/checkpoints/epoch=4.ckpt", 4)
    (tmp_path / "version_11/checkpoints").mkdir(parents=True)
    assert checkpoint_of(tmp_path) == newest
    assert checkpoint_of(tmp_path / "version_9") == tmp_path / "version_9/checkpoints/last.ckpt"
    assert checkpoint_of(tmp_path / "version_9/checkpoints") == tmp_path / "version_9/checkpoints/last.ckpt"


def test_of_two_runs_in_one_folder_the_last_of_the_later_counts(tmp_path):
    touch(tmp_path / "checkpoints/last.ckpt", 1)
    newest = touch(tmp_path / "checkpoints/last-v1.ckpt", 2)
    touch(tmp_path / "checkpoints/last-best.ckpt", 3)
    assert checkpoint_of(tmp_path) == newest
    os.utime(tmp_path / "checkpoints/last.ckpt", (4, 4))  # the first run goes on
    assert checkpoint_of(tmp_path) == tmp_path / "checkpoints/last.ckpt"


def test_without_last_the_newest_file_counts(tmp_path):
    touch(tmp_path / "checkpoints/b.ckpt", 1)
    newest = touch(tmp_path / "checkpoints/a.ckpt", 2)
    assert checkpoint_of(tmp_path) == newest


def test_a_file_is_itself_and_a_folder_without_checkpoints_is_refused(tmp_path):
    assert checkpoint_of(Path("any.ckpt")) == Path("any.ckpt")
    with pytest.raises(FileNotFoundError, match="Argument `ckpt_path` expected a checkpoint or the folder of a run"):
        checkpoint_of(tmp_path, argument="ckpt_path")


@pytest.mark.parametrize("given", [".", "../inner", "deep/.."])
def test_a_folder_without_a_name_of_its_own_has_one_beside_it(tmp_path, monkeypatch, given):
    inner = tmp_path / "inner"
    (inner / "deep").mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert free_folder(Path(given)).resolve() == tmp_path / "inner-1"
    with whole_folder(Path(given)) as unfinished:
        (unfinished / "file").touch()
    assert [path.name for path in inner.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("found", ["file", "empty folder", "nothing"])
def test_finished_work_is_named_only_where_there_is_some(tmp_path, capsys, found):
    kept = tmp_path / "report.partial"
    if found != "nothing":
        kept.mkdir()
    if found == "file":
        (kept / "block").touch()
    with pytest.raises(KeyboardInterrupt), remedies(kept):
        raise KeyboardInterrupt
    anew = "No part was finished, and nothing is kept: the same command starts anew."
    goes_on = f"The same command goes on from here; finished work is in {kept}."
    assert capsys.readouterr().err == f"Interrupted. {goes_on if found == 'file' else anew}\n"
    with pytest.raises(OSError, match="The disk is full") as error, remedies(kept):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (str(kept) in str(error.value)) == (found == "file")
