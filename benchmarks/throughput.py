"""Images per second in training: our module under a Lightning Trainer against a bare PyTorch loop, and fast settings.

    python -m benchmarks.throughput                          the CIFAR U-Net, 35.7 M parameters, batch 128
    python -m benchmarks.throughput --width 32 --batch-size 16     in a few minutes
    python -m benchmarks.throughput --fast channels_last bf16 fused compile
    python -m benchmarks.throughput --digits --steps 800     the small U-Net of the digits, under the command line

The bare loop does the same work over the same U-Net of diffusers: noise, loss, clipped gradients, Adam, moving average.
Its steps alternate with the Trainer's in one run, so that a drift of the machine meets them alike; the ratio is that of
the medians. Fast settings are measured in a second run, again in turns with the bare loop in float32: what they gain is
the ratio of the two ratios. The losses of both runs, on the same images and noise, are printed beside each other.

Of the digits the run is that of `lightning-iet fit --config digits/baseline` without its evaluation: epochs of four
steps, with all that they begin and end with. Its time is that of the processor, on one thread, so that other work on
the machine changes little; means count, since medians leave out the ends of epochs.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import ClassVar, cast

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.agc_step import CIFAR
from lightning_iet import DiffusionModule
from lightning_iet.cli import main as command_line

LIMIT, FAST_LIMIT, FAST_LIMIT_GPU = 0.97, 1.5, 3.0
DIGITS_LIMIT = 1.10
SETTINGS = ("channels_last", "bf16", "fused", "compile")


def make_unet(width: int) -> UNet2DModel:
    """The U-Net of the paper on CIFAR-10, or a narrower one."""
    channels = tuple(width * multiplier for multiplier in (1, 2, 2, 2))
    return UNet2DModel(**(CIFAR | {"block_out_channels": channels, "attention_head_dim": None, "norm_eps": 1e-6}))


class BareLoop:
    """What one writes without Lightning, one step at a time."""

    def __init__(
        self,
        unet: UNet2DModel,
        loader: DataLoader,
        device: torch.device,
        *,
        lr: float = 2e-4,
        decay: float = 0.9999,
        clip: float | None = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.unet = unet.to(device).train()
        self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=lr, fused=clip is None or None)
        self.scheduler = DDPMScheduler()
        self.batches = self._batches(loader)
        self.device, self.clip, self.clock = device, clip, clock

    @staticmethod
    def _batches(loader: DataLoader) -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    def step(self) -> float:
        """Take a step; returns its seconds."""
        start = self.clock()
        images = next(self.batches)[0].to(self.device, non_blocking=True) * 2 - 1
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=self.device)
        prediction = self.unet(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = F.mse_loss(prediction, noise)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.clip)
        self.optimizer.step()
        self.ema.update_parameters(self.unet)
        wait(self.device)
        return self.clock() - start


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(eq=False)  # for a set of callbacks
class Turns(pl.Callback):
    """Lets the bare loop take a step after each of the Trainer's."""

    bare: BareLoop
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = self.bare.clock()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        """Stop it, and let the other one work."""
        wait(pl_module.device)
        self.ours.append(self.bare.clock() - self.start)
        self.losses.append(outputs["loss"].detach())
        with torch.random.fork_rng():  # the next step's noise must not depend on the settings
            self.theirs.append(self.bare.step())
        torch.manual_seed(batch_idx)
        self.start = self.bare.clock()


class TurnsOfARun(Turns):
    """Takes turns with a run of the command line, on the processor's time."""

    last: ClassVar["TurnsOfARun"]

    def __init__(self) -> None:
        super().__init__(bare=cast("BareLoop", None))  # made from the run's own network
        type(self).last = self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the bare loop of the same network, data and settings."""
        loader = trainer.datamodule.train_dataloader()
        unet, device = copy.deepcopy(pl_module.unet), pl_module.device
        self.bare = BareLoop(unet, loader, device, lr=1e-3, decay=0.995, clip=None, clock=time.process_time)
        super().on_train_start(trainer, pl_module)


def measure(options: argparse.Namespace, fast: list[str]) -> Turns:
    """Train with some fast settings, in turns with the bare loop in float32."""
    torch.manual_seed(0)
    unet, bare = make_unet(options.width), make_unet(options.width)
    images = torch.rand(options.batch_size * (options.steps + options.warm_up), 3, 32, 32)
    loader = DataLoader(TensorDataset(images), batch_size=options.batch_size, pin_memory=torch.cuda.is_available())
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    module = DiffusionModule(
        unet,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-4, fused="fused" in fast or None),
        channels_last="channels_last" in fast,
        compile="compile" in fast,
    )
    turns = Turns(BareLoop(bare, loader, device))
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if "bf16" in fast else "32-true",
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    for seconds in (turns.ours, turns.theirs):
        del seconds[: options.warm_up]
    return turns


def measure_digits(options: argparse.Namespace) -> None:
    """Run `fit` on the digits in turns with the bare loop, and print the ratio."""
    torch.set_num_threads(1)
    turns = [{"class_path": f"{TurnsOfARun.__module__}.{TurnsOfARun.__name__}"}]
    epochs = -(-(options.steps + options.warm_up) // 4)
    with TemporaryDirectory() as folder:
        command_line([
            "fit", "--config", "digits/baseline", f"--trainer.logger.save_dir={folder}",
            f"--trainer.max_epochs={epochs}", f"--trainer.callbacks+={json.dumps(turns)}", "--evaluation.num_samples=0",
        ])  # fmt: skip
    ours, theirs = (
        sum(times[options.warm_up :]) / len(times[options.warm_up :])
        for times in (TurnsOfARun.last.ours, TurnsOfARun.last.theirs)
    )
    print(f"a step under the command line {1e3 * ours:.2f} ms, of the bare loop {1e3 * theirs:.2f} ms of the processor")
    print(f"ratio {ours / theirs:.3f} (at most {DIGITS_LIMIT} is wanted)")


def report(options: argparse.Namespace, default: Turns, fast: Turns | None) -> None:
    """Print images per second, their ratios and what they should be."""
    table = Table("run", "Trainer", "bare loop, float32", "ratio", "mean loss", title="Images per second")
    ratios = []
    for name, turns in (("float32", default), (" ".join(options.fast), fast)):
        if turns is not None:
            ours, theirs = (options.batch_size / statistics.median(times) for times in (turns.ours, turns.theirs))
            ratios.append(ours / theirs)
            loss = torch.stack(turns.losses).float().mean().item()
            table.add_row(name, f"{ours:.2f}", f"{theirs:.2f}", f"{ratios[-1]:.3f}", f"{loss:.4f}")
    Console().print(table)
    spread = max(default.ours) / min(default.ours)
    print(f"Trainer against bare loop: {ratios[0]:.3f} (at least {LIMIT} is wanted; steps scatter by {spread:.2f})")
    if fast is not None:
        wanted = FAST_LIMIT_GPU if torch.cuda.is_available() else FAST_LIMIT
        print(f"fast settings against float32: {ratios[1] / ratios[0]:.2f} (at least {wanted} is wanted)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="channels of the first block (default: 128, 35.7 M)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step (default: 128)")
    parser.add_argument("--steps", type=int, default=20, help="counted steps (default: 20)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--fast", nargs="*", choices=SETTINGS, default=list(SETTINGS[:3]), help="none = no second run")
    parser.add_argument("--digits", action="store_true", help="the small U-Net of the digits, under the command line")
    options = parser.parse_args()
    if options.digits:
        measure_digits(options)
        return
    warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|logging interval).*")
    default = measure(options, [])
    report(options, default, measure(options, options.fast) if options.fast else None)


if __name__ == "__main__":
    main()
