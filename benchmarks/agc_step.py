"""What anti-gradient control costs: the time of a training step with it over the time of a step without.

    python benchmarks/agc_step.py            # the CIFAR-10 U-Net of the paper, 35.7 M parameters, batch 16
    python benchmarks/agc_step.py --small    # a U-Net that takes milliseconds a step

Both kinds of step alternate in one run of a Lightning ``Trainer``; the ratio is that of the medians. On a machine with
other work to do it scatters by more than AGC costs: see the spread of the steps, and the time spent inside AGC itself,
which is taken in the same steps (on an accelerator: the host's share of it).
"""

import argparse
import logging
import statistics
import time
import warnings
from contextlib import ExitStack

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.seams import open_seam

LIMIT = 1.02
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


class Denoiser(pl.LightningModule):
    """Predicts the noise, and returns one loss per sample."""

    def __init__(self, **settings):
        super().__init__()
        self.unet = UNet2DModel(**settings)

    def training_step(self, batch, batch_idx):
        """One step on noisy images."""
        images = batch[0]
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=self.device)
        losses = F.mse_loss(self.unet(images + noise, timesteps).sample, noise, reduction="none").mean((1, 2, 3))
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}

    def configure_optimizers(self):
        """Adam, as published."""
        return torch.optim.Adam(self.parameters(), lr=2e-4)


class Alternate(pl.Callback):
    """Switches AGC on in every second step, and takes the time of each."""

    def __init__(self, agc):
        self.agc = agc
        self.seam = ExitStack()
        self.seconds = {False: [], True: []}
        self.inside = []

    def observe(self, sample_loss, timesteps):
        """Let AGC look at a batch, and take the time of that."""
        start = time.perf_counter()
        keep = self.agc._observe(sample_loss, timesteps)
        self.inside.append(time.perf_counter() - start)
        return keep

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Open the seam before every second step."""
        self.with_agc = batch_idx % 2 == 1
        if batch_idx == 0:
            self.agc.setup(trainer, pl_module, "fit")
        if self.with_agc:
            self.seam.enter_context(open_seam(pl_module, self.observe))
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop the clock, then close the seam."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[self.with_agc].append(time.perf_counter() - self.start)
        self.seam.close()


def measure(settings, pairs, batch_size):
    """Return the seconds of steps without and with AGC, and those inside AGC, the first pair left out."""
    torch.manual_seed(0)
    images = torch.rand(2 * (pairs + 1) * batch_size, 3, settings["sample_size"], settings["sample_size"])
    timer = Alternate(AntiGradientControl())
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Denoiser(**settings), DataLoader(TensorDataset(images), batch_size=batch_size))
    return timer.seconds[False][1:], timer.seconds[True][1:], timer.inside[1:]


def report(name, seconds):
    """Print the median and the spread of some times; return the median."""
    median = statistics.median(seconds)
    print(f"{name:<18}{median * 1e3:10.2f} ms (median; {min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f})")
    return median


def main():
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small U-Net")
    parser.add_argument("--pairs", type=int, help="steps of each kind (default: 10, with --small 200)")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    settings = SMALL if arguments.small else CIFAR
    pairs = arguments.pairs or (200 if arguments.small else 10)
    without, with_agc, inside = measure(settings, pairs, arguments.batch_size)
    parameters = sum(parameter.numel() for parameter in UNet2DModel(**settings).parameters())
    print(f"{parameters / 1e6:.1f} M parameters, batch {arguments.batch_size}, {pairs} steps of each kind")
    base = report("step without AGC", without)
    ratio = report("step with AGC", with_agc) / base
    share = report("inside AGC", inside) / base
    print(f"ratio of the medians {ratio:.4f} (limit {LIMIT}); inside AGC {share:.5f} of a step")


if __name__ == "__main__":
    main()
