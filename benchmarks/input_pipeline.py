"""Whether reading images keeps up with training: images per second of the loaders over those that training consumes.

    python -m benchmarks.input_pipeline                        # a small U-Net, whose rate is measured in the same run
    python -m benchmarks.input_pipeline --model cifar --device cuda --bf16 --batch 128
    python -m benchmarks.input_pipeline --train-rate 3000      # what your own training consumes

Two data sets of 32x32 colour images, mirrored at random: arrays in memory, as CIFAR is held, and a folder of PNG files,
which the workers decode. Each is read plainly and in 10 shards, where every sample's random generators are seeded. The
time of a pass is that from its first batch to its last, with nothing done to the batches.
"""

import argparse
import contextlib
import os
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel
from torch.utils.data import DataLoader

from benchmarks.agc_step import CIFAR, SMALL
from benchmarks.read_images import write
from lightning_iet import DiffusionModule, ShardedDataModule
from lightning_iet.data import ImageDataModule, ImageFolderDataModule, IndexedImages

LIMIT = 2.0
MODELS = {"small": SMALL | {"sample_size": 32}, "cifar": CIFAR}


class Arrays(ImageDataModule):
    """Random images in memory."""

    def load(self) -> IndexedImages:
        """As many as there are files."""
        number = int(self.root.name)
        return IndexedImages(torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8), torch.arange(number) % 10)


def loader_rate(loader: DataLoader, passes: int) -> float:
    """Images per second of passes over a loader; the workers have been started before."""
    rates = []
    for _ in range(passes + 1):
        batches = iter(loader)
        next(batches)
        begin = perf_counter()
        images = sum(len(batch[0]) for batch in batches)
        rates.append(images / (perf_counter() - begin))
    return median(rates[1:])


def loaders(data: pl.LightningDataModule) -> dict[str, DataLoader]:
    """The training loader plainly, and in shards."""
    data.setup("fit")
    return {"plain": data.train_dataloader(), "10 shards": ShardedDataModule(data, 10).train_dataloader()}


def train_rate(settings: dict, *, batch: int, device: str, bf16: bool, steps: int) -> float:
    """Images per second of training steps on a batch that lies on the device already."""
    module = DiffusionModule(UNet2DModel(**settings)).to(device)
    optimizer = torch.optim.Adam(module.unet.parameters(), lr=2e-4)
    images = torch.rand(batch, 3, 32, 32, device=device)
    precision = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    times = []
    for _ in range(steps + 2):
        begin = perf_counter()
        timesteps = torch.randint(module.num_timesteps, (batch,), device=device)
        with precision:
            loss = module.losses(images, timesteps, torch.randn_like(images)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        times.append(perf_counter() - begin)
    return batch / median(times[2:])


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="of each data set (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each core")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="over each loader, after a first one (default: 3)")
    parser.add_argument("--train-rate", type=float, help="images per second; not given: measured")
    parser.add_argument("--model", choices=MODELS, default="small", help="whose rate is measured (default: small)")
    parser.add_argument("--device", default="cpu", help="of that model (default: cpu)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="of that training (default: %(default)s)")
    args = parser.parse_args()
    consumed = args.train_rate or train_rate(
        MODELS[args.model], batch=args.batch, device=args.device, bf16=args.bf16, steps=args.steps
    )
    rates = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write(folder, args.images, 32)
        common = {"batch_size": args.batch, "num_workers": args.workers, "flip": True, "num_control": 0}
        files = ImageFolderDataModule(folder, check=False, **common)
        for name, data in (("arrays", Arrays(Path(str(args.images)), **common)), ("PNG files", files)):
            for way, loader in loaders(data).items():
                rates[f"{name}, {way}"] = loader_rate(loader, args.passes)

    print(f"{args.images} images 3x32x32, mirrored, batches of {args.batch}, {args.workers} workers\n")
    print(f"training consumes {consumed:.0f} images / s\n")
    print(f"{'':22}{'images / s':>12}{'ratio':>8}")
    for name, rate in rates.items():
        print(f"{name:22}{rate:12.0f}{rate / consumed:8.1f}")
    print(f"\nsmallest ratio: {min(rates.values()) / consumed:.1f} (at least {LIMIT} is wanted)")


if __name__ == "__main__":
    main()
