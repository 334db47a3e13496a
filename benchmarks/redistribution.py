"""What IET-AGC+ costs: counting samples in a step, and an exchange of samples between shards.

python -m benchmarks.redistribution counting    a step with counts, records or augmentation, against one without
python -m benchmarks.redistribution exchange    an exchange of 1,000,000 samples among 10 shards, on one core
python -m benchmarks.redistribution reading     reading images that are augmented, against reading them as they are

The model of `counting` is the U-Net of DDPM on CIFAR-10 (35.7 M parameters). All times are those of the processor, on
one core, so that other work on the machine counts little; take ratios of one run.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_iet import AntiGradientControl, ThresholdAwareAugmentation
from lightning_iet.callbacks.anti_gradient_control.sample_record import SampleCounts, SampleRecords
from lightning_iet.data.augmentation import Augmented
from lightning_iet.functional.redistribution import redistribute
from lightning_iet.functional.sharding import partition


def counting(*, num_samples: int, pairs: int, parameters: str, batch_size: int) -> None:
    """Time a decision about a batch with counts, with records and without either, as a share of a training step."""
    step, forward = seconds_of_a_step(parameters, pairs, batch_size)
    title = f"{num_samples:,} samples, batches of {batch_size}; a step of {parameters} takes {step:.3f} s"
    table = Table(title=title)
    for column in ("decision", "milliseconds", "step takes"):
        table.add_column(column, justify="left" if column == "decision" else "right")
    options = {"pairs": pairs, "batch_size": batch_size}
    plain = seconds_of_a_decision(AntiGradientControl(0.5), None, **options)
    rows = [("published AGC, without counts", plain)]
    for name, agc in (
        ("with counts", AntiGradientControl(0.5)),
        ("record, fixed threshold", AntiGradientControl(criterion="record")),
        ("record, below the median", AntiGradientControl(criterion="record", delta=0.3)),
        ("record, weights", AntiGradientControl(criterion="record", eta=0.03)),
    ):
        rows.append((name, seconds_of_a_decision(agc, num_samples, **options)))
    judged = seconds_of_a_decision(augmenting(num_samples), num_samples, **options)
    rows.append(("counts, and augmentation at the next draw", judged))
    rows.append(("the same in the same step: a forward pass more", judged + forward))
    for name, seconds in rows:
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{(step + seconds) / (step + plain):.4f} ×")
    Console().print(table)


def augmenting(num_samples: int) -> AntiGradientControl:
    """Anti-gradient control with the tables that augmentation has while a run lasts."""
    agc, augmentation = AntiGradientControl(0.5), ThresholdAwareAugmentation()
    agc.augmentation, augmentation._control = augmentation, agc
    augmentation._current = torch.zeros(num_samples, dtype=torch.uint8)
    augmentation._next = augmentation._current.clone()
    augmentation._sums = torch.zeros(4, agc.bins.num_bins, dtype=torch.long)
    return agc


def seconds_of_a_step(parameters: str, pairs: int, batch_size: int) -> tuple[float, float]:
    """Median time of a training step, forward, backward and Adam; and of a forward pass alone."""
    from diffusers import UNet2DModel

    from benchmarks.agc_step import CIFAR

    small = {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D",) * 2,
             "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 8}  # fmt: skip
    model = UNet2DModel(**(CIFAR if parameters == "35.7M" else CIFAR | small))
    optimizer, times, forwards = torch.optim.Adam(model.parameters(), lr=2e-4), [], []
    for _ in range(max(2, min(pairs, 5))):
        start = time.process_time()
        images, timesteps = torch.rand(batch_size, 3, 32, 32), torch.randint(1000, (batch_size,))
        model(images, timesteps).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
        start = time.process_time()
        with torch.no_grad():
            model(images, timesteps)
        forwards.append(time.process_time() - start)
    return statistics.median(times[1:]), statistics.median(forwards[1:])


def seconds_of_a_decision(agc: AntiGradientControl, num_samples: int | None, *, pairs: int, batch_size: int) -> float:
    """Median time of `select`, which is all that AGC does in a step."""
    if num_samples is not None:
        agc.counts = SampleCounts(num_samples)
        agc.records = SampleRecords(num_samples) if agc.criterion == "record" else None
    times = []
    for _ in range(50 * pairs):
        losses, timesteps = torch.rand(batch_size) + 0.01, torch.randint(1000, (batch_size,))
        if num_samples is not None:
            agc.batch_index = torch.randint(num_samples, (batch_size,))
        start = time.process_time()
        agc.select(losses, timesteps)
        times.append(time.process_time() - start)
    return statistics.median(times[len(times) // 2 :])


def exchange(*, num_samples: int, num_shards: int, repeats: int) -> None:
    """Time an exchange, on one core, without and with classes."""
    table = Table(title=f"An exchange of {num_samples:,} samples among {num_shards} shards, on one core")
    for column in ("samples move", "moved", "seconds (median)"):
        table.add_column(column, justify="right")
    skips = torch.randint(20, (num_samples,), dtype=torch.int32)
    labels = torch.randint(1000, (num_samples,))
    for name, classes in (("within shards", None), ("within 1,000 classes", labels)):
        shards = partition(num_samples, num_shards, labels=classes)
        times = []
        for _ in range(repeats):
            start = time.process_time()
            moved = redistribute(shards, skips, 0.25, labels=classes).moved
            times.append(time.process_time() - start)
        table.add_row(name, f"{sum(map(len, moved)):,}", f"{statistics.median(times):.3f}")
    Console().print(table)


def reading(*, num_samples: int, size: int, repeats: int, batch_size: int) -> None:
    """Time reading images in this process, with a share of them augmented."""
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
            start = time.process_time()
            for _ in DataLoader(augmented, batch_size=batch_size):
                pass
            times.append((time.process_time() - start) / num_samples)
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
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "counting":
        counting(
            num_samples=arguments.num_samples or 50_000, pairs=arguments.pairs, parameters=arguments.parameters,
            batch_size=arguments.batch_size,
        )  # fmt: skip
    elif arguments.what == "exchange":
        exchange(
            num_samples=arguments.num_samples or 1_000_000, num_shards=arguments.num_shards, repeats=arguments.pairs
        )
    else:
        reading(
            num_samples=arguments.num_samples or 2000, size=arguments.size, repeats=arguments.pairs,
            batch_size=arguments.batch_size,
        )  # fmt: skip


if __name__ == "__main__":
    main()
