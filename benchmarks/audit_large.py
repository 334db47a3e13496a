"""What an audit costs over the arithmetic that it needs: large images by pixels, small ones by a network.

    python -m benchmarks.audit_large                              # 1024 x 1024 pixels; a minute or two
    python -m benchmarks.audit_large --size 256 --repeats 1       # quick
    python -m benchmarks.audit_large network --images 1300        # EfficientNet and mirrored images, of 28 x 28 pixels

Large images: the audit of 70 generated, 120 training and 60 held-out ones, without the search for moved copies, against
the squared distances of all pairs that it asks for, as one would write them: one float32 matrix product of the rows of
all pixels for generated, held-out and planted images with training images, and for training images among themselves;
and for the searches for disguised copies one for each of the 8 flips, of grey images of 32 x 32 and of 8 x 8 pixels.
The baseline holds all images in float32 beforehand, and neither converts nor shrinks anything.

Network: the features of images, as they are and mirrored, as `--features efficientnet --invariance flip` takes them,
and all searches, against the network's passes over twice as many images that are resized already, one batch after the
other.

Images are in memory: what reading files costs, `benchmarks.read_images` says. Both sides run in turns; the ratio is
that of their medians. The memory is what the audit takes at its peak beyond what the process held before, the images
included.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.core import Audit, Settings, audit_images
from lightning_iet.audit.disguises import DEGRADED, FLIPS, SIDE
from lightning_iet.audit.features import Features, build_features
from lightning_iet.audit.reading import ImageSet, image_set
from lightning_iet.audit.search import Invariance

LIMITS = {"pixels": 1.5, "network": 1.2}
SMALL = 28  # pixels of the images that go through the network
SIDE_OF_NETWORK = 224
BATCH = 4  # images of a pass of the baseline, with which it is fastest on a CPU


def pictures(number: int, channels: int, size: int, seed: int) -> Tensor:
    """Make smooth images with a little noise, a few at a time."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(number, channels, size, size, dtype=torch.uint8)
    for image in images:
        coarse = 255 * torch.rand(1, channels, 8, 8, generator=generator)
        fine = F.interpolate(coarse, (size, size), mode="bicubic")[0]
        noise = 4 * torch.randn(fine.shape, generator=generator)
        image.copy_(fine.add_(noise).clamp_(0, 255))
    return images


def three_sets(numbers: tuple[int, int, int], channels: int, size: int) -> dict[str, ImageSet]:
    """Make generated, training and held-out images; every tenth generated one is a copy."""
    names = ("generated", "train", "held_out")
    pixels = {
        name: pictures(n, channels, size, seed) for seed, (name, n) in enumerate(zip(names, numbers, strict=True))
    }
    copied = pixels["generated"][::10]
    copied.copy_(pixels["train"][: len(copied)])
    return {name: image_set(images, location=name) for name, images in pixels.items()}


def audited(sets: dict[str, ImageSet], features: Features, k: int, invariance: Invariance = "none") -> Audit:
    """Audit all sets with an empty cache."""
    settings = Settings(k=k, invariance=invariance, moved=False)
    with TemporaryDirectory() as folder:
        return audit_images(**sets, features=features, cache=BlockCache(Path(folder)), settings=settings)


def products(rows: dict[str, Tensor], flips: int) -> None:
    """Compute the squared distances that an audit by pixels asks for."""
    train = rows["train"]
    for name, part in rows.items():
        squared_distances(part, train)
        for side in (SIDE, DEGRADED) if name != "train" else ():
            for _ in range(flips):
                squared_distances(part[:, : side**2], train[:, : side**2])


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Write ``|x - y|^2`` as ``|x|^2 + |y|^2 - 2 <x, y>``."""
    lengths, others = (torch.linalg.vector_norm(rows, dim=1).square() for rows in (one, other))
    return lengths[:, None] + others - 2 * (one @ other.T)


def passes(network: Callable[[Tensor], Tensor], batch: Tensor, number: int) -> None:
    """Let a number of images that are resized already pass through a network."""
    with torch.inference_mode():
        for start in range(0, number, len(batch)):
            network(batch[: number - start])


def status(field: str) -> float:
    """Return a field of the process's memory in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def compare(baseline: Callable[[], object], audit: Callable[[], object], repeats: int) -> tuple[list[float], ...]:
    """Time both in turns; return the seconds of each, of the clock and of the cores, and the audit's peak memory."""
    found: tuple[list[float], ...] = ([], [], [], [], [])
    for _ in range(repeats):
        for side, work in enumerate((baseline, audit)):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before = status("VmRSS")
            start, used = perf_counter(), process_time()
            work()
            found[side].append(perf_counter() - start)
            found[2 + side].append(process_time() - used)
        found[4].append(status("VmHWM") - before)  # of the audit, which was the last
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=LIMITS, default="pixels", help="what to measure (default: pixels)")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side, of large images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=6500, help="of all sets, for the network (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    args = parser.parse_args()
    baseline, audit = (large if args.part == "pixels" else small)(args)
    *times, memory = compare(baseline, audit, args.repeats)
    bare, whole, bare_cores, whole_cores = (median(values) for values in times)
    name = "distances alone" if args.part == "pixels" else "passes alone"
    print(f"{name} {bare:.2f} s, audit {whole:.2f} s: ratio {whole / bare:.2f} (at most {LIMITS[args.part]})")
    print(f"of the cores' time {bare_cores:.2f} s and {whole_cores:.2f} s: ratio {whole_cores / bare_cores:.2f}")
    print(f"memory beyond the images at most {max(memory):.2f} GiB")


def large(args: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return both sides of the comparison of large images."""
    sets = three_sets((70, 120, 60), 3, args.size)
    features = build_features("pixels")
    planted = audited(sets, features, k=50).planted.images
    rows = {name: images.pixels.flatten(1).float() for name, images in (sets | {"planted": planted}).items()}
    numbers = ", ".join(f"{len(part)} {name.replace('_', '-')}" for name, part in rows.items())
    print(f"{numbers} images, 3x{args.size}x{args.size}")
    return (lambda: products(rows, len(FLIPS))), (lambda: audited(sets, features, k=50))


def small(args: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return both sides of the comparison of small images."""
    train = 10 * args.images // 13
    others = (args.images - train) // 3
    sets = three_sets((args.images - train - others, train, others), 1, SMALL)
    features = build_features("efficientnet")
    planted = audited(sets, features, k=50, invariance="flip").planted.images
    searched = len(planted) + sum(len(images) for name, images in sets.items() if name != "train")
    number = 2 * searched + train
    batch = torch.rand(BATCH, 3, SIDE_OF_NETWORK, SIDE_OF_NETWORK, generator=torch.Generator().manual_seed(0))
    network = features.rows.network.network.extract_features  # type: ignore[attr-defined]
    print(f"{train} training and {searched} other images, the latter mirrored as well: {number} passes")
    return (lambda: passes(network, batch, number)), (lambda: audited(sets, features, k=50, invariance="flip"))


if __name__ == "__main__":
    main()
