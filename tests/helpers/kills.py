"""Runs in sessions of their own, which can be killed like a machine that loses power."""

import os
import shutil
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data._utils import worker

from lightning_iet import AntiGradientControl, DigitsDataModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.interruptions import StopSignal, resume_from
from lightning_iet.utilities.checkpoints import check_whole
from tests.helpers.distributed import forking, free_port, start_quietly, torchrun_environment
from tests.helpers.models import quiet_trainer, tiny_diffusion

EPOCHS, STEPS = 3, 8  # 4 shards take 2 steps each in an epoch


class Session:
    """A training run as a session of processes: ``world_size`` gloo processes and the workers of their loaders.

    Args:
        folder: Where it writes checkpoints, the steps it has done, and its result.
        **settings: Those of :func:`train`.
    """

    def __init__(self, folder, world_size=1, **settings):
        arguments = (folder, world_size, free_port(), settings)
        self.process = forking().Process(target=_lead, args=arguments)
        self.process.start()
        self.id = self.process.pid

    def kill(self, number=signal.SIGKILL, only="all"):
        """A signal to ``"all"`` of its processes, or to the ``"first"`` or the ``"second"`` alone."""
        with suppress(ProcessLookupError):
            if only == "all":
                os.killpg(self.id, number)
            else:
                os.kill(sorted(processes_of(self.id))[only == "second"], number)

    def wait(self, timeout):
        """Wait for all of it to end; returns the leader's status. Whatever is left then is killed, and an error."""
        end = time.monotonic() + timeout
        self.process.join(timeout)
        while (left := processes_of(self.id)) and time.monotonic() < end:
            time.sleep(0.01)
        if left or self.process.exitcode is None:
            self.kill()
            self.process.join(10)
            raise TimeoutError(f"Processes {left} of a run did not end within {timeout} s.")
        return self.process.exitcode


def processes_of(session):
    """The living processes of a session: ``{id: command}``."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit():
                # pid (command) state parent group session …
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


def _lead(folder, world_size, port, settings):
    """The first process of a session; it starts the others."""
    os.setsid()
    start_quietly()
    worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds in which workers notice that they are alone; 5 by default
    others = []
    rank = 0
    for number in range(1, world_size):
        child = os.fork()
        if child == 0:
            rank, others = number, []
            break
        others.append(child)
    status = 1
    try:
        if world_size > 1:
            os.environ.update(torchrun_environment(rank, world_size, port))
        train(Path(folder), world_size, **settings)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        Path(folder, f"error-{rank}.txt").write_text(repr(error))
    for child in others:
        os.waitpid(child, 0)
    os._exit(status)


def train(folder, world_size=1, *, start="last", num_workers=0, ballast=0, pause=0.0, **saving):
    """Train, from the last checkpoint if there is one; leaves the final weights in ``final.pt``."""
    torch.manual_seed(11)
    module = tiny_diffusion(warmup_steps=5, unet={"dropout": 0.1, "mid_block_type": None})
    # Frozen: it takes part in nothing, and makes checkpoints large, so that a kill often meets one half-written.
    module.ballast = nn.Parameter(torch.arange(float(ballast)), requires_grad=False)
    saving = ModelCheckpoint(**{"every_n_train_steps": 1, "save_last": True} | saving)
    trainer = quiet_trainer(
        folder,
        callbacks=[
            AntiGradientControl(0.5),
            ParameterAveragingCallback(4, every_n_epochs=2),
            saving,
            Diary(pause),
            StopSignal(),
        ],
        max_epochs=EPOCHS,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
    )
    start = resume_from(trainer, start)
    data = ShardedDataModule(DigitsDataModule(26, batch_size=4, num_workers=num_workers), 4, partition="iid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
    if trainer.global_rank == 0:
        torch.save(module.state_dict(), folder / "final.pt")


class Diary(pl.Callback):
    """Writes down at which step a run started, and with each step that begins, how many it has done and saved."""

    def __init__(self, pause):
        self.pause = pause

    def note(self, trainer, word):
        if trainer.global_rank == 0:
            with Path(trainer.default_root_dir, "diary.txt").open("a") as file:
                file.write(f"{word} {trainer.global_step}\n")

    def on_train_start(self, trainer, pl_module):
        self.note(trainer, "start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer, "done")
        time.sleep(self.pause)


@dataclass
class Tally:
    """What many kills did."""

    kills: int = 0
    half_written: int = 0  # files that a kill had met unfinished
    finished: int = 0  # runs that reached their end between two kills
    lost: list[int] = field(
        default_factory=list
    )  # steps begun since the checkpoint from which the run went on, per kill


def kill_again_and_again(folder, kills, check, *, seed, world_size=1, **settings):
    """Start a run, kill all of it at a random moment, every second time while it writes a checkpoint; and so on.

    Checked after each kill: every file with the name of a checkpoint is whole, and there is one of every step that was
    done; and after the next start: it has gone on from the newest. A run that reaches its end is given to ``check``,
    and another starts afresh.
    """
    random, tally = Random(seed), Tally()
    while tally.kills < kills:
        reached, starts = progress(folder), len(diary(folder, "start"))
        unfinished = set(folder.rglob("*.unfinished"))
        session = Session(folder, world_size, **settings)
        if tally.kills % 2:
            time.sleep(random.uniform(0.05, 2.0))
        else:
            within = EPOCHS * STEPS // 2 // world_size  # half of the checkpoints of a run
            _freeze_while_saving(folder, session, random.randint(1, within), delay=random.uniform(0, 0.005))
        session.kill()
        tally.half_written += len(set(folder.rglob("*.unfinished")) - unfinished)
        started = diary(folder, "start")[starts:]
        assert started in ([], [reached[1]]), f"Went on from {started}, and not from {reached}."
        if session.wait(10) == 0:
            tally.finished += 1
            check(folder)
            shutil.rmtree(folder)
            folder.mkdir()
            continue
        tally.kills += 1
        done, saved = max(diary(folder, "done"), default=-1), progress(folder)[1]
        assert saved >= done, f"The checkpoint of step {done} is gone; the newest is of {saved}."
        tally.lost.append(max(done + 1 - saved, 0))
    return tally


def _freeze_while_saving(folder, session, times, *, delay, timeout=300):
    """Stop the session while it writes a checkpoint, its ``times``-th or, if that was written too fast, a later one."""
    end, before = time.monotonic() + timeout, set(folder.glob("checkpoints/.*.unfinished"))
    while session.process.is_alive() and time.monotonic() < end:
        now = set(folder.glob("checkpoints/.*.unfinished"))
        times -= bool(now - before)
        if times <= 0 and now - before:
            time.sleep(delay)
            session.kill(signal.SIGSTOP)
            if any(path.exists() for path in now - before):
                return
            session.kill(signal.SIGCONT)
            now = set()
        before = now


def progress(folder):
    """The checkpoint that is farthest in the run, by reading all of them: ``(epoch, step)``. None may be torn."""
    steps = [(0, 0)]
    for path in folder.rglob("*.ckpt"):
        check_whole(path, argument="ckpt")
        content = torch.load(path, weights_only=True)
        steps.append((content["epoch"], content["global_step"]))
    return max(steps)


def diary(folder, word):
    """The steps written down under a word. A line that a kill has cut off does not count."""
    path = Path(folder, "diary.txt")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(word) and line.endswith("\n")]
