"""The command line goes on with runs that were cut off."""

import csv
import enum
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_iet.cli import main
from tests.helpers.command_line import fails
from tests.helpers.launched import callback, weights, write_config
from tests.helpers.models import DictModule
from tests.helpers.state import undisturbed
from tests.helpers.weights import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    torch.set_num_threads(1)


def fit(*arguments, **settings):
    main(["fit", "--config", str(write_config(Path("tiny.yaml"), **settings)), "--ckpt_path", "last", *arguments])


def checkpoint(version, name="last.ckpt"):
    return Path(f"runs/tiny/version_{version}/checkpoints", name)


def test_one_command_starts_a_run_and_goes_on_with_it(caplog, tiny_weights):
    fit("--trainer.max_epochs=2")
    first = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    fit()
    assert f"Going on from '{checkpoint(0)}', step 16." in caplog.messages
    assert [message for message in caplog.messages if "are averaged" in message] == [
        "The shards are averaged every 2 epochs and at the end: 2 times in this run of 3 epochs, but 1 time in the one "
        "that wrote the checkpoint, of 2."
    ]
    assert_same_bits(weights("."), tiny_weights)
    # Nothing of the first part was touched.
    assert first == {path: path.read_bytes() for path in Path("runs/tiny/version_0").rglob("*") if path.is_file()}
    assert (checkpoint(1).parents[1] / "config.yaml").is_file()
    # The log goes on where the other ended; the averaging at the end of the run comes after its last epoch.
    for version, epochs in enumerate([["0", "1"], ["2", "3"]]):
        with Path(f"runs/tiny/version_{version}/metrics.csv").open() as file:
            # Shards have a row of their own in each epoch.
            assert list(dict.fromkeys(row["epoch"] for row in csv.DictReader(file))) == epochs


@pytest.fixture(scope="module")
def after_one_epoch(tmp_path_factory):
    """The folder of a run that stopped after one epoch of 8 steps."""
    folder = tmp_path_factory.mktemp("one")
    with undisturbed(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-iet"])
        torch.set_num_threads(1)
        fit("--trainer.max_epochs=1")
    return folder


@pytest.fixture
def stopped(after_one_epoch, tmp_path):
    """A copy of it, in which the test stands."""
    shutil.copytree(after_one_epoch, tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("stopped")
def test_a_run_that_is_complete_has_nothing_more_to_do():
    fit("--trainer.max_epochs=1")
    assert_same_bits(torch.load(checkpoint(0))["state_dict"], weights("."))


@pytest.mark.usefixtures("stopped")
def test_a_torn_file_is_named_and_the_one_before_it_used(caplog):
    step = checkpoint(0, "epoch=0-step=8.ckpt")
    checkpoint(0).write_bytes(checkpoint(0).read_bytes()[:-1000])
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    fit("--trainer.max_epochs=2")
    assert caplog.text.count("Passed over") == 1
    assert f"Passed over: Argument `ckpt_path` expected a whole checkpoint, but got '{checkpoint(0)}'" in caplog.text
    assert f"Going on from '{step}'" in caplog.text


@pytest.mark.usefixtures("stopped")
def test_another_number_of_shards_is_refused_with_both_numbers(capsys):
    config = write_config(Path("tiny.yaml"))
    error = fails(capsys, "fit", "--config", str(config), "--ckpt_path", "last", "--averaging.num_shards", "3")
    assert "number of shards 2, but got 3" in error


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.usefixtures("stopped")
def test_a_checkpoint_that_asks_to_run_code_is_refused(capsys):
    torch.save(torch.load(checkpoint(0)) | {"hyper_parameters": Evil()}, "evil.ckpt")
    config = write_config(Path("tiny.yaml"))
    error = fails(capsys, "fit", "--config", str(config), "--ckpt_path", "evil.ckpt")
    assert "expected a checkpoint of tensors and plain values, but got 'evil.ckpt'" in error
    assert "posix.mkdir" in error
    assert "weights_only" not in error  # torch's advice to open it all the same
    assert not Path("evil").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(capsys, monkeypatch, tiny_weights):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:  # two for each file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    config = str(write_config(Path("tiny.yaml")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = fails(capsys, "fit", "--config", config, "--ckpt_path", "last")
    assert "could not be written (No space left on device" in error
    assert "--ckpt_path last" in error
    assert not list(Path("runs").rglob("*.unfinished"))
    fit()
    assert_same_bits(weights("."), tiny_weights)


def test_sigterm_ends_with_its_status_and_a_checkpoint_of_that_step(tiny_weights, caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    saving = {"save_on_exception": True, "every_n_train_steps": 1000}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(saving=saving, callbacks=[callback("Terminate", step=4)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(checkpoint(0))["global_step"] == 5
    command = "The same command with --ckpt_path last goes on from the last checkpoint."
    assert caplog.messages.count(f"Stopped by SIGTERM after step 5. {command}") == 1
    fit(saving=saving, callbacks=[callback("Terminate", step=4)])
    assert_same_bits(weights("."), tiny_weights)


def test_a_run_stopped_before_its_first_checkpoint_promises_none(caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    with pytest.raises(SystemExit):
        fit(saving={"every_n_train_steps": 1000}, callbacks=[callback("Terminate", step=4)])
    assert caplog.messages.count("Stopped by SIGTERM after step 5.") == 1


def test_the_curve_of_a_resumed_run_begins_with_the_first_part():
    quick = ["--evaluation.k=5", "--evaluation.num_samples=12", "--evaluation.num_inference_steps=2"]
    quick += ["--evaluation.features=none"]  # those of all digits would take most of the time
    fit("--trainer.max_epochs=1", *quick)
    fit("--trainer.max_epochs=2", *quick)
    for version in (0, 1):
        assert (checkpoint(version).parents[1] / "curves.png").is_file()
        assert json.loads((checkpoint(version).parents[1] / "metrics.json").read_text())
    losses = torch.load(checkpoint(1))["evaluation"]["losses"]
    assert list(losses) == [0, 1]


class Speed(enum.Enum):
    FAST = 1


class WithSettings(DictModule):
    """A user's own module that saves hyperparameters, of a kind that the command line chooses."""

    def __init__(self, kind: str = "plain"):
        super().__init__()
        values = {
            "plain": {"width": 8, "folder": Path("cache")},
            "numpy": {"mean": np.float64(0.5), "std": np.array([0.2]), "state": np.random.default_rng(0)},
            "omegaconf": OmegaConf.create({"width": 8, "levels": [1, 2]}),
            "enumeration": {"speed": Speed.FAST},
            "network": {"loss": torch.nn.MSELoss()},
        }
        self.save_hyperparameters(values[kind])


class Numbers(pl.LightningDataModule):
    def train_dataloader(self):
        numbers = torch.utils.data.TensorDataset(torch.rand(8, 3, dtype=torch.float64))
        return torch.utils.data.DataLoader(numbers, batch_size=4)


def fit_own(kind, epochs, *arguments):
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", f"--trainer.logger.name={kind}"]
    shown = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    own = [f"--model={__name__}.WithSettings", f"--model.kind={kind}", f"--data={__name__}.Numbers"]
    off = ["--evaluation.num_samples=0", f"--trainer.max_epochs={epochs}", *logger, *shown, *arguments]
    main(["fit", *own, *off])


@pytest.mark.parametrize(
    ("kind", "given"), [("plain", "path"), ("numpy", "last"), ("omegaconf", "path"), ("enumeration", "last")]
)
def test_a_users_hyperparameters_do_not_keep_a_run_from_going_on(kind, given, caplog):
    fit_own(kind, 1, "--ckpt_path=last")
    (path,) = Path(f"runs/{kind}/version_0/checkpoints").glob("*.ckpt")
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    fit_own(kind, 2, f"--ckpt_path={'last' if given == 'last' else path}")
    (after,) = Path(f"runs/{kind}/version_1/checkpoints").glob("*.ckpt")
    assert after.name == "epoch=1-step=4.ckpt"
    assert given == "path" or f"Going on from '{path}', step 2." in caplog.text


@pytest.mark.filterwarnings("ignore:Attribute 'loss' is an instance of:UserWarning")
def test_hyperparameters_that_could_run_code_are_named_at_once_and_stop_the_next_part(capsys):
    with pytest.warns(
        UserWarning, match=r"was written, but no run can go on from it: its `hyper_parameters\.loss` is a"
    ):
        fit_own("network", 1, "--ckpt_path=last")
    (path,) = Path("runs/network/version_0/checkpoints").glob("*.ckpt")
    for given in ("last", str(path)):
        with pytest.raises(SystemExit):
            fit_own("network", 2, f"--ckpt_path={given}")
        error = capsys.readouterr().err
        assert f"'{path}': its `hyper_parameters.loss` is a torch.nn.modules.loss.MSELoss" in error
        assert "--trust-checkpoint" in error
        assert not Path("runs/network/version_1/checkpoints").exists()
    with pytest.warns(UserWarning, match="no run can go on from it"):
        fit_own("network", 2, "--ckpt_path=last", "--trust-checkpoint")
    assert [file.name for file in Path("runs/network").rglob("epoch=1-*.ckpt")] == ["epoch=1-step=4.ckpt"]
