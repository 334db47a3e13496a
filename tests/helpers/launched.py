"""Runs of the command line that torchrun starts, and callbacks for their YAML that disturb or watch them."""

import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml

from lightning_iet import ParameterAveragingCallback

ROOT = Path(__file__).parents[2]
MODULES = "tests.helpers.launched"

TINY = {
    "seed_everything": 3,
    "model": {
        "class_path": "DiffusionModule",
        "init_args": {
            "unet": {
                "class_path": "diffusers.UNet2DModel",
                "init_args": {
                    "sample_size": 8,
                    "in_channels": 1,
                    "out_channels": 1,
                    "layers_per_block": 1,
                    "block_out_channels": [8],
                    "norm_num_groups": 4,
                    "down_block_types": ["DownBlock2D"],
                    "up_block_types": ["UpBlock2D"],
                    "add_attention": False,
                },
            },
            "ema_decay": 0.9,
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"num_train": 32, "batch_size": 4}},
    "averaging": {"num_shards": 2, "every_n_epochs": 2},
    "agc": {"threshold": 0.5},
    "evaluation": {"num_samples": 0},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,  # of 4 steps for each of 2 shards
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "tiny"},
        },
    },
}


def write_config(path, *, callbacks=(), saving=None, **trainer):
    """The tiny run as YAML, with a checkpoint after every epoch."""
    arguments = {"every_n_train_steps": 8, "save_last": True} | (saving or {})
    checkpoints = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
    config = TINY | {"trainer": TINY["trainer"] | {"callbacks": [checkpoints, *callbacks]} | trainer}
    path.write_text(yaml.safe_dump(config))
    return path


def weights(folder):
    """Those of the newest of the tiny runs in a folder."""
    newest = max(Path(folder, "runs/tiny").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    return torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def callback(name, **arguments):
    return {"class_path": f"{MODULES}.{name}", "init_args": arguments}


@contextmanager
def started(*command, folder, log, **environment):
    """A process in a session of its own; in the end it is dead, and so is all that it had started if it still ran."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait(10)


def kill_tree(parent):
    """Kill a process and all that it has started, in other sessions too (torchrun gives each process its own), and wait
    until they are dead; what runs for a program of a warm Python (:mod:`tests.helpers.warm`) counts as started by it.

    Raises:
        TimeoutError: if a process is not dead after 10 s.
    """
    try:
        ended = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        os.kill(parent, signal.SIGSTOP)  # starts nothing new
        folder = Path(f"/proc/{parent}")
        children = [child for file in folder.glob("task/*/children") for child in file.read_text().split()]
        children += re.findall(r"^for (\d+)$", (folder / "comm").read_text())
        for child in children:
            kill_tree(int(child))
        os.kill(parent, signal.SIGKILL)
    is_dead = select.select([ended], [], [], 10)[0]
    os.close(ended)
    if not is_dead:
        raise TimeoutError(f"Process {parent} is still alive.")


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "lightning_iet"]


class DieOnce(pl.Callback):
    """Kills its process, the second of the run, in the middle of an epoch; not again after a restart."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flag = Path("died")
        if trainer.global_rank == 1 and trainer.global_step == self.step and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Starts(pl.Callback):
    """Writes down at which step each attempt started."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 0:
            with Path("starts.txt").open("a") as file:
                file.write(f"{trainer.global_step}\n")


class CutOff(pl.Callback):
    """Takes the network interface of the second process down, once, and notes the time."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flag = Path("cut_off")
        if trainer.global_rank == 1 and trainer.global_step == self.step and not flag.exists():
            subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)
            flag.write_text(str(time.time()))


class CountBytes(pl.Callback):
    """Writes down what the network interface has sent: before each step, after it, and after saving."""

    def on_train_start(self, trainer, pl_module):
        averaging = next(c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback))
        self.note(trainer, averaging.engine.layout.nbytes)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer, "start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer, "end")

    def note(self, trainer, word):
        interface = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"])
        with Path(f"sent-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{word} {(interface / 'statistics/tx_bytes').read_text()}")


def sent(folder, rank):
    """What :class:`CountBytes` saw: (bytes of one copy, bytes sent within each step, and from one step to the next)."""
    notes = [line.split() for line in Path(folder, f"sent-{rank}.txt").read_text().splitlines()]
    starts = [int(count) for word, count in notes if word == "start"]
    ends = [int(count) for word, count in notes if word == "end"]
    within = [end - start for start, end in zip(starts, ends, strict=False)]
    to_next = [after - before for before, after in itertools.pairwise(starts)]
    return int(notes[0][0]), within, to_next


class Terminate(pl.Callback):
    """Sends its own process SIGTERM in the middle of a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flag = Path("terminated")
        if trainer.global_step == self.step and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGTERM)
