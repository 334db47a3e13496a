"""What anti-gradient control costs: the time of a training step with it over the time of a step without.

    python benchmarks/agc_step.py            # the CIFAR-10 U-Net of the paper, 35.7 M parameters, batch 16
    python benchmarks/agc_step.py --small    # a U-Net that takes milliseconds a step
    python benchmarks/agc_step.py --digits   # the digits' U-Net of configs/digits, batch 14
    python benchmarks/agc_step.py --reference held_out    # anchored: unseen images are measured in every fifth step

Twice: on a module that returns its losses per sample, and on one that nobody adapted, where hooks find them. Both kinds
of step alternate in one run of a Lightning ``Trainer``; the ratio is that of the medians. Anchored, five steps with
AGC, one of which measures unseen images, alternate with five without, and times are the mean of five. On a machine with
other work to do it scatters by more than AGC costs: see the spread of the steps, and the time spent inside AGC itself,
which is taken in the same steps (on an accelerator: the host's share of it). Memory is the peak of the process in each
step (of the accelerator's memory there), as far as the system tells.

Of the digits, a step takes milliseconds: times are those of the processor, on one thread, so that other work on the
machine changes little.
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl

LIMITS = {"train": (1.02, 1.01), "held_out": (1.10, 1.02)}  # of the time, and of the memory
DIGITS_LIMIT = 1.03  # of the time, in steps so short that each operation counts
CLEAR = Path("/proc/self/clear_refs")
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "dropout": 0.1,
}
SMALL = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8} | {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
DIGITS = SMALL | {"sample_size": 8, "in_channels": 1, "out_channels": 1, "add_attention": False}


class PerSample(pl.LightningModule):
    """Predicts the noise, and returns one loss per sample."""

    def __init__(self, **settings):
        super().__init__()
        self.unet = UNet2DModel(**settings)

    def noisy(self, images):
        """Noisy images, their noise and timesteps."""
        noise = torch.randn_like(images)
        return images + noise, noise, torch.randint(1000, (len(images),), device=self.device)

    def training_step(self, batch, batch_idx):
        """One step on noisy images."""
        noisy, noise, timesteps = self.noisy(batch[0])
        losses = F.mse_loss(self.unet(noisy, timesteps).sample, noise, reduction="none").mean((1, 2, 3))
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}

    def validation_step(self, batch, batch_idx):
        """Lightning warns of validation images without it."""

    def configure_optimizers(self):
        """Adam, as published."""
        return torch.optim.Adam(self.parameters(), lr=2e-4)


class Unadapted(PerSample):
    """The same, as somebody who knows nothing of AGC writes it."""

    def training_step(self, batch, batch_idx):
        """One step on noisy images."""
        noisy, noise, timesteps = self.noisy(batch[0])
        return F.mse_loss(self.unet(noisy, timesteps).sample, noise)


class Alternate(AntiGradientControl):
    """Is at work in every second stretch of steps, and takes the time and the memory of each."""

    def __init__(self, reference, clock):
        super().__init__(reference=reference)
        self.clock = clock
        self.stretch = 1 if reference == "train" else self._reference.every
        self.seconds = {False: [], True: []}
        self.memory = {False: [], True: []}
        self.inside = []
        self.measuring = []  # nearly nothing, but for the steps that measure unseen images
        self.at_work = True

    def select(self, sample_loss, timesteps):
        """Decide about a batch, and take the time of it, if at work."""
        if not self.at_work:
            return None
        start = self.clock()
        keep = super().select(sample_loss, timesteps)
        self.inside.append(self.clock() - start)
        return keep

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Record what the module computes in every second stretch."""
        self.at_work = batch_idx // self.stretch % 2 == 0
        if batch_idx % self.stretch == 0:
            reset_peak_memory()
            self.start = self.clock()
        if self.at_work:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer, pl_module, loss):
        """Decide about a batch, if at work."""
        if self.at_work:
            super().on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer, pl_module):
        """Measure unseen images, if at work and due."""
        if self.at_work:
            start = self.clock()
            super().on_after_backward(trainer, pl_module)
            self.measuring.append(self.clock() - start)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop the clock."""
        if self.at_work:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % self.stretch:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[self.at_work].append((self.clock() - self.start) / self.stretch)
        self.memory[self.at_work].append(peak_memory())


def reset_peak_memory():
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_memory():
    """Bytes since the last reset; NaN where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not CLEAR.exists():
        return float("nan")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def measure(kind, settings, pairs, batch_size, reference, clock=time.perf_counter):
    """Run steps with and without AGC by turns; return the callback that took notes."""
    torch.manual_seed(0)
    timer = Alternate(reference, clock)
    shape = (settings.get("in_channels", 3), settings["sample_size"], settings["sample_size"])
    images = torch.rand(2 * (pairs + 1) * timer.stretch * batch_size, *shape)
    train, unseen = (DataLoader(TensorDataset(x), batch_size=batch_size) for x in (images, torch.rand(16, *shape)))
    trainer = pl.Trainer(
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(kind(**settings), train, unseen)
    return timer


def report(name, seconds):
    """Print the median and the spread of some times; return the median."""
    median = statistics.median(seconds)
    print(f"{name:<18}{median * 1e3:10.2f} ms (median; {min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f})")
    return median


def main():
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a small U-Net")
    size.add_argument("--digits", action="store_true", help="the digits' U-Net, in time of the processor on one thread")
    parser.add_argument("--pairs", type=int, help="of stretches of steps (default: 10, with --small and --digits 200)")
    parser.add_argument("--batch-size", type=int, help="default: 16, with --digits 14")
    parser.add_argument("--reference", choices=sorted(LIMITS), default="train", help="whose losses the bank holds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    settings, clock = SMALL if arguments.small else CIFAR, time.perf_counter
    pairs = arguments.pairs or (200 if arguments.small or arguments.digits else 10)
    batch_size = arguments.batch_size or (14 if arguments.digits else 16)
    if arguments.digits:
        settings, clock = DIGITS, time.process_time
        torch.set_num_threads(1)
    parameters = sum(parameter.numel() for parameter in UNet2DModel(**settings).parameters())
    limit, memory_limit = LIMITS[arguments.reference]
    if arguments.digits and arguments.reference == "train":
        limit = DIGITS_LIMIT
    print(f"{parameters / 1e6:.1f} M parameters, batch {batch_size}, {pairs} measurements of each kind")
    for kind, name in ((PerSample, "losses per sample"), (Unadapted, "hooks")):
        timer = measure(kind, settings, pairs, batch_size, arguments.reference, clock)
        print(f"\n{name}")
        base = report("step without AGC", timer.seconds[False][1:])  # the first step of each kind is another matter
        ratio = report("step with AGC", timer.seconds[True][1:]) / base
        share = report("inside AGC", timer.inside[1:]) / base
        if arguments.reference != "train":
            measuring = statistics.fmean(timer.measuring[timer.stretch :]) / base
            print(f"measuring unseen images takes {measuring:.4f} of a step, spread over all steps")
        memory = statistics.median(timer.memory[True][1:]) / statistics.median(timer.memory[False][1:])
        print(f"ratio of the medians {ratio:.4f} (limit {limit}); inside AGC {share:.5f} of a step")
        print(f"ratio of the memory {memory:.4f} (limit {memory_limit})")


if __name__ == "__main__":
    main()
