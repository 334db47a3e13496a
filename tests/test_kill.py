"""A run that is killed again and again, and started again by the same command, ends in the bits of one that was not."""

import signal
import time

import pytest
import torch

from tests.helpers.kills import Session, diary, kill_again_and_again, processes_of, progress
from tests.helpers.weights import assert_same_bits

BALLAST = 1_000_000  # 4 MB in each checkpoint


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """Weights of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("uncut")
    assert Session(folder, ballast=BALLAST, every_n_train_steps=1000, save_last=False).wait(600) == 0
    return torch.load(folder / "final.pt")


def finish(folder, world_size, uncut):
    """Let the run go on to its end, undisturbed."""
    assert Session(folder, world_size, ballast=BALLAST, every_n_train_steps=10).wait(600) == 0
    check(folder, uncut)


def check(folder, uncut):
    assert_same_bits(torch.load(folder / "final.pt"), uncut)
    assert not list(folder.rglob("*.unfinished"))
    assert not list(folder.glob("error*"))


@pytest.mark.parametrize(("world_size", "kills"), [(1, 2), (2, 1)])  # many more in benchmarks/kills.py
def test_a_run_killed_while_it_saves_and_at_a_random_moment_ends_in_the_same_bits(tmp_path, uncut, world_size, kills):
    folder = tmp_path / "run"
    folder.mkdir()
    tally = kill_again_and_again(
        folder, kills, lambda folder: check(folder, uncut), seed=world_size, world_size=world_size, ballast=BALLAST
    )
    assert tally.half_written
    assert max(tally.lost) <= 1  # a checkpoint after every step
    finish(folder, world_size, uncut)


def test_the_other_processes_end_when_one_is_killed(tmp_path, uncut):
    """Two processes with a worker each: the workers notice by themselves, the other process by its connection."""
    session = Session(tmp_path, 2, num_workers=1, pause=0.1, ballast=BALLAST)
    await_steps(tmp_path, 3)
    assert len(processes_of(session.id)) >= 4
    session.kill(only="second")
    assert session.wait(200) != 0
    error = tmp_path / "error-0.txt"
    assert "gloo/transport" in error.read_text()
    error.unlink()
    finish(tmp_path, 1, uncut)


@pytest.mark.parametrize(("world_size", "receiver"), [(1, "all"), (2, "second")])
def test_sigterm_ends_all_processes_after_a_step_with_a_checkpoint(tmp_path, uncut, world_size, receiver):
    """With a worker for each process, which gets the signal too where it goes to all."""
    saving = {"save_on_exception": True, "every_n_train_steps": 1000}
    workers = 1 if receiver == "all" else 0
    session = Session(tmp_path, world_size, ballast=BALLAST, num_workers=workers, pause=0.02, **saving)
    await_steps(tmp_path, 4)
    session.kill(signal.SIGTERM, only=receiver)
    assert session.wait(200) == 128 + signal.SIGTERM
    assert progress(tmp_path)[1] >= max(diary(tmp_path, "done")) >= 3
    finish(tmp_path, 1, uncut)
    assert diary(tmp_path, "start")[1] >= 3


def await_steps(folder, number, timeout=300):
    end = time.monotonic() + timeout
    while len(diary(folder, "done")) < number:
        assert time.monotonic() < end
        time.sleep(0.005)
