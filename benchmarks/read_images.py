"""How near reading a folder of images comes to what decoding them costs.

    python -m benchmarks.read_images --images 50000

The floor is Pillow alone: open, decode and copy every file to an array, in as many processes as there are cores, with
nothing kept. The audit's reading does that too, and hashes the bytes, and stores the pixels for the next time; a
second reading takes them from there. All sides run in turns, and their medians are compared.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from PIL import Image

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import read_images
from lightning_iet.data.sources import open_source

LIMIT = 2.0


def write(folder: Path, count: int, size: int) -> None:
    """Write smooth random images, which PNG compresses about as it does photographs."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")


def decode_alone(path: Path) -> int:
    """Decode one file and forget it."""
    with Image.open(path) as image:
        return np.asarray(image).shape[0]


def floor(folder: Path, cores: int) -> None:
    """Decode all files on all cores."""
    files = sorted(folder.iterdir())
    with get_context("fork").Pool(cores) as pool:
        for _ in pool.imap_unordered(decode_alone, files, chunksize=256):
            pass


def read(folder: Path, cache: Path) -> None:
    """Read all files as the audit does."""
    source = open_source(folder, argument="train")
    read_images(source, BlockCache(cache), argument="train", location=str(folder))


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="number of files (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    times: dict[str, list[float]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write(folder, args.images, args.size)
        for number in range(args.repeats):
            cache = Path(temporary, f"cache-{number}")
            sides = {"decoding alone": partial(floor, folder, cores), "first reading": partial(read, folder, cache)}
            for name, work in (sides | {"second reading": partial(read, folder, cache)}).items():
                times.setdefault(name, []).append(seconds(work))

    print(f"{args.images} PNG files, 3x{args.size}x{args.size}, {cores} cores, {args.repeats} rounds\n")
    print(f"{'':18}{'median s':>10}{'images / s':>12}")
    for name, values in times.items():
        print(f"{name:18}{median(values):10.2f}{args.images / median(values):12.0f}")
    ratio = median(times["first reading"]) / median(times["decoding alone"])
    print(f"\nfirst reading over decoding alone: {ratio:.2f} (at most {LIMIT})")


if __name__ == "__main__":
    main()
