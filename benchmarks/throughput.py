"""Images per second in training: our module under a Lightning Trainer against a bare PyTorch loop, and fast settings.

    python -m benchmarks.throughput                          the CIFAR U-Net, 35.7 M parameters, batch 128
    python -m benchmarks.throughput --width 32 --batch-size 16     in a few minutes
    python -m benchmarks.throughput --fast channels_last bf16 fused compile

The bare loop does the same work over the same U-Net of diffusers: noise, loss, clipped gradients, Adam, moving average.
Its steps alternate with the Trainer's in one run, so that a drift of the machine meets them alike; the ratio is that of
the medians. Fast settings are measured in a second run, again in turns with the bare loop in float32: what they gain is
the ratio of the two ratios. The losses of both runs, on the same images and noise, are printed beside each other.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, field

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

LIMIT, FAST_LIMIT, FAST_LIMIT_GPU = 0.97, 1.5, 3.0
SETTINGS = ("channels_last", "bf16", "fused", "compile")


def make_unet(width: int) -> UNet2DModel:
    """The U-Net of the paper on CIFAR-10, or a narrower one."""
    channels = tuple(width * multiplier for multiplier in (1, 2, 2, 2))
    return UNet2DModel(**(CIFAR | {"block_out_channels": channels, "attention_head_dim": None, "norm_eps": 1e-6}))


class BareLoop:
    """What one writes without Lightning, one step at a time."""

    def __init__(self, unet: UNet2DModel, loader: DataLoader, device: torch.device) -> None:
        self.unet = unet.to(device).train()
        self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=2e-4)
        self.scheduler = DDPMScheduler()
        self.batches = iter(loader)
        self.device = device

    def step(self) -> float:
        """Take a step; returns its seconds."""
        start = time.perf_counter()
        images = next(self.batches)[0].to(self.device, non_blocking=True) * 2 - 1
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=self.device)
        prediction = self.unet(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = F.mse_loss(prediction, noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.unet)
        wait(self.device)
        return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Turns(pl.Callback):
    """Lets the bare loop take a step after each of the Trainer's."""

    bare: BareLoop
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        """Stop it, and let the other one work."""
        wait(pl_module.device)
        self.ours.append(time.perf_counter() - self.start)
        self.losses.append(outputs["loss"].detach())
        with torch.random.fork_rng():  # the next step's noise must not depend on the settings
            self.theirs.append(self.bare.step())
        torch.manual_seed(batch_idx)
        self.start = time.perf_counter()


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
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|logging interval).*")
    default = measure(options, [])
    report(options, default, measure(options, options.fast) if options.fast else None)


if __name__ == "__main__":
    main()
