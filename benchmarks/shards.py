"""What shards cost beside training: turning from one to the next, memory, and what a second process brings.

python -m benchmarks.shards swap        a turn from shard to shard, against a shard's epoch of 40 steps
python -m benchmarks.shards memory      peak memory with 10 shards in one process, against plain training plus 9 states
python -m benchmarks.shards processes   2 processes on 2 cores, against 1 process on 1 core, in images per second

The model is the U-Net of DDPM on CIFAR-10 (35.7 M parameters) with EMA and Adam; every figure comes from a run of
Lightning's trainer. On a machine with other work to do the figures scatter: take the ratio of one quiet run.
"""

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.agc_step import CIFAR
from lightning_iet import DiffusionModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.shards.state import estimate_state_bytes
from lightning_iet.utilities.devices import peak_memory

# Of 32 × 32 images too, but small enough that a process takes hundreds of steps in a minute.
MEDIUM = CIFAR | {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}


class Noise(pl.LightningDataModule):
    """Random images, as many as shards × steps × batch."""

    def __init__(self, num: int, batch_size: int):
        super().__init__()
        self.num, self.batch_size = num, batch_size

    def train_dataloader(self):
        """A loader of float images in [0, 1]."""
        images = torch.rand(self.num, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images), batch_size=self.batch_size, shuffle=True)


class Clock(pl.Callback):
    """Times training steps, and the turns between shards."""

    def __init__(self):
        self.steps: list[float] = []
        self.turns: list[float] = []
        self.ends: list[float] = []
        self.state_bytes = 0

    def on_train_start(self, trainer, pl_module):
        """Wrap the engine's turn in a clock."""
        averaging = next(c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback))
        engine = averaging.engine
        if engine is None:
            return
        self.state_bytes = estimate_state_bytes(engine.layout)
        activate = engine.activate

        def timed(shard: int) -> None:
            before, start = engine.active, time.perf_counter()
            activate(shard)
            # The first turns to each shard copy no optimizer state: there is none.
            if before not in (None, shard) and trainer.current_epoch > 0:
                self.turns.append(time.perf_counter() - start)

        engine.activate = timed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Start the clock of a step, behind the turn."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop it."""
        self.ends.append(time.perf_counter())
        self.steps.append(self.ends[-1] - self.start)


def train(unet, shards, *, steps, epochs, batch_size, offload="none", devices=1):
    """Train; returns the clock."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    clock, quiet = Clock(), ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            callbacks=[ParameterAveragingCallback(shards, offload=offload), clock],
            max_epochs=epochs,
            default_root_dir=folder,
            **dict.fromkeys(quiet, False),
        )
        data = Noise(shards * steps * batch_size, batch_size)
        trainer.fit(DiffusionModule(UNet2DModel(**unet)), ShardedDataModule(data, shards))
    return clock


def worker(options: argparse.Namespace) -> None:
    """Train in a process of its own, and print what it took as JSON."""
    unet = MEDIUM if options.unet == "medium" else CIFAR
    clock = train(
        unet,
        options.shards,
        steps=options.steps,
        epochs=options.epochs,
        batch_size=options.batch_size,
        offload=options.offload,
        devices=options.devices,
    )
    report = {
        "steps": clock.steps,
        "turns": clock.turns,
        # Of all steps but the first five, with everything between them, averagings included.
        "images_per_second": options.batch_size * (len(clock.ends) - 6) / (clock.ends[-1] - clock.ends[5])
        if len(clock.ends) > 6
        else None,
        "state_bytes": clock.state_bytes,
        "peak_bytes": peak_memory(),
    }
    print(json.dumps(report))


def start(*, cores: list[int] | None = None, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Start a worker, on chosen cores."""
    command = [sys.executable, "-m", "benchmarks.shards", "worker"]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    environment = os.environ | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen) -> dict:
    """What a worker printed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(output.splitlines()[-1])


def swap(options: argparse.Namespace) -> None:
    """A turn, beside 40 steps, for each place where states may lie."""
    table = Table("states", "a turn", "40 steps", "share", "wanted", title=f"batch {options.batch_size}, CPU")
    for offload, wanted in (("none", 0.005), ("cpu", 0.1), ("disk", None)):
        report = result(start(shards=2, steps=3, epochs=3, batch_size=options.batch_size, offload=offload))
        turn, epoch = statistics.median(report["turns"]), 40 * statistics.median(report["steps"])
        limit = f"at most {wanted:.1%}" if wanted else "-"
        table.add_row(offload, f"{turn * 1e3:.1f} ms", f"{epoch:.1f} s", f"{turn / epoch:.3%}", limit)
    Console().print(table)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of 10 shards, beside plain training and nine more states."""
    common = {"steps": 2, "epochs": 2, "batch_size": options.batch_size}
    plain = result(start(shards=1, **common))
    many = result(start(shards=10, **common))
    state = many["state_bytes"]
    expected = plain["peak_bytes"] + 9 * state
    gib = 2**30
    table = Table("", "GiB", title="peak resident memory of a process")
    table.add_row("one state: weights, EMA, two moments", f"{state / gib:.2f}")
    table.add_row("plain training", f"{plain['peak_bytes'] / gib:.2f}")
    table.add_row("plain training + 9 states", f"{expected / gib:.2f}")
    table.add_row("10 shards", f"{many['peak_bytes'] / gib:.2f}")
    Console().print(table)
    print(f"ratio {many['peak_bytes'] / expected:.3f} (at most 1.05 is wanted)")


def processes(options: argparse.Namespace) -> None:
    """Images per second of two pinned processes, beside one."""
    common = {"unet": "medium", "shards": 2, "epochs": 3, "steps": 30, "batch_size": options.batch_size}
    one_thread = {"OMP_NUM_THREADS": "1"}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repeats):
        alone = result(start(cores=[0], environment=one_thread, devices=1, **common))
        rates[1].append(alone["images_per_second"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = []
        for rank in range(2):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
            environment = one_thread | {name: str(value) for name, value in torchrun.items()}
            both.append(start(cores=[rank], environment=environment, devices=2, **common))
        reports = [result(process) for process in both]
        rates[2].append(sum(report["images_per_second"] for report in reports))
    one, two = (statistics.median(rates[number]) for number in (1, 2))
    table = Table("processes", "images per second", title="2 shards, a U-Net of 32 × 32 images")
    table.add_row("1 on 1 core", f"{one:.1f}")
    table.add_row("2 on 2 cores", f"{two:.1f}")
    Console().print(table)
    print(f"ratio {two / one:.2f} (at least 1.85 is wanted)")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["swap", "memory", "processes", "worker"])
    parser.add_argument("--batch-size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of processes (default: 3)")
    for name, default in (("shards", 2), ("steps", 3), ("epochs", 2), ("devices", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--offload", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--unet", default="cifar", help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"swap": swap, "memory": memory, "processes": processes, "worker": worker}[options.what](options)


if __name__ == "__main__":
    main()
