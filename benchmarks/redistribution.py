"""What IET-AGC+ costs: counting samples in a step, and an exchange of samples between shards.

python -m benchmarks.redistribution counting    a step with counts by sample (and records) against one without
python -m benchmarks.redistribution exchange    an exchange of 1,000,000 samples among 10 shards, on one core
python -m benchmarks.redistribution reading     reading images that are augmented, against reading them as they are

The model of `counting` is the U-Net of DDPM on CIFAR-10 (35.7 M parameters); steps with and without take turns. On a
machine with other work to do the figures scatter: take the ratio of one quiet run.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_iet import AntiGradientControl
from lightning_iet.callbacks.anti_gradient_control.sample_record import SampleCounts, SampleRecords
from lightning_iet.data.augmentation import Augmented
from lightning_iet.functional.redistribution import redistribute
from lightning_iet.functional.sharding import partition

BATCH = 128


def counting(*, num_samples: int, pairs: int, parameters: str) -> None:
    """Time a decision about a batch with counts, with records and without either, as a share of a training step."""
    step = seconds_of_a_step(parameters, pairs)
    table = Table(title=f"{num_samples:,} samples, batches of {BATCH}; a step of {parameters} takes {step:.3f} s")
    for column in ("decision", "milliseconds", "step takes"):
        table.add_column(column, justify="left" if column == "decision" else "right")
    plain = seconds_of_a_decision(AntiGradientControl(0.5), None, pairs=pairs)
    rows = [("published AGC, without counts", plain)]
    for name, agc in (
        ("with counts", AntiGradientControl(0.5)),
        ("record, fixed threshold", AntiGradientControl(criterion="record")),
        ("record, below the median", AntiGradientControl(criterion="record", delta=0.3)),
        ("record, weights", AntiGradientControl(criterion="record", eta=0.03)),
    ):
        rows.append((name, seconds_of_a_decision(agc, num_samples, pairs=pairs)))
    for name, seconds in rows:
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{(step + seconds) / (step + plain):.4f} ×")
    Console().print(table)


def seconds_of_a_step(parameters: str, pairs: int) -> float:
    """Median time of a training step, forward, backward and Adam."""
    from diffusers import UNet2DModel

    from benchmarks.agc_step import CIFAR

    small = {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D",) * 2,
             "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 8}  # fmt: skip
    model = UNet2DModel(**(CIFAR if parameters == "35.7M" else CIFAR | small))
    optimizer, times = torch.optim.Adam(model.parameters(), lr=2e-4), []
    for _ in range(max(2, min(pairs, 5))):
        start = time.perf_counter()
        images, timesteps = torch.rand(BATCH, 3, 32, 32), torch.randint(1000, (BATCH,))
        model(images, timesteps).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def seconds_of_a_decision(agc: AntiGradientControl, num_samples: int | None, *, pairs: int) -> float:
    """Median time of `select`, which is all that AGC does in a step."""
    if num_samples is not None:
        agc.counts = SampleCounts(num_samples)
        agc.records = SampleRecords(num_samples) if agc.criterion == "record" else None
    times = []
    for _ in range(50 * pairs):
        losses, timesteps = torch.rand(BATCH) + 0.01, torch.randint(1000, (BATCH,))
        if num_samples is not None:
            agc._index = torch.randint(num_samples, (BATCH,))
        start = time.perf_counter()
        agc.select(losses, timesteps)
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 2 :])


def exchange(*, num_samples: int, num_shards: int, repeats: int) -> None:
    """Time an exchange, on one core, without and with classes."""
    torch.set_num_threads(1)
    table = Table(title=f"An exchange of {num_samples:,} samples among {num_shards} shards, on one core")
    for column in ("samples move", "moved", "seconds (median)"):
        table.add_column(column, justify="right")
    skips = torch.randint(20, (num_samples,), dtype=torch.int32)
    labels = torch.randint(1000, (num_samples,))
    for name, classes in (("within shards", None), ("within 1,000 classes", labels)):
        shards = partition(num_samples, num_shards, labels=classes)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            moved = redistribute(shards, skips, 0.25, labels=classes).moved
            times.append(time.perf_counter() - start)
        table.add_row(name, f"{sum(map(len, moved)):,}", f"{statistics.median(times):.3f}")
    Console().print(table)


def reading(*, num_samples: int, size: int, repeats: int) -> None:
    """Time reading images in this process, with a share of them augmented."""
    torch.set_num_threads(1)
    images = torch.rand(num_samples, 3, size, size)
    augmented = Augmented([(image, 0) for image in images])  # type: ignore[arg-type]
    table = Table(title=f"Reading {num_samples:,} images of {size} × {size} in one process")
    for column in ("augmented", "microseconds per image"):
        table.add_column(column, justify="right")
    for share in (0.0, 0.1, 0.5, 1.0):
        magnitudes = (torch.rand(num_samples) < share).to(torch.uint8) * 3
        augmented.magnitudes.write(magnitudes, seed=0, epoch=0)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in DataLoader(augmented, batch_size=BATCH):
                pass
            times.append((time.perf_counter() - start) / num_samples)
        table.add_row(f"{share:.0%}", f"{1e6 * statistics.median(times):.0f}")
    Console().print(table)


def main() -> None:
    """Read arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["counting", "exchange", "reading"])
    parser.add_argument("--num-samples", type=int, help="training samples")
    parser.add_argument("--num-shards", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=3, help="the longer, the steadier")
    parser.add_argument("--parameters", choices=["35.7M", "small"], default="35.7M")
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.what == "counting":
        counting(num_samples=arguments.num_samples or 50_000, pairs=arguments.pairs, parameters=arguments.parameters)
    elif arguments.what == "exchange":
        exchange(
            num_samples=arguments.num_samples or 1_000_000, num_shards=arguments.num_shards, repeats=arguments.pairs
        )
    else:
        reading(num_samples=arguments.num_samples or 2000, size=arguments.size, repeats=arguments.pairs)


if __name__ == "__main__":
    main()
