"""Exact nearest neighbours: our search against faiss's exhaustive one, on the same images, in one run.

    pip install faiss-cpu
    python -m benchmarks.neighbors            # a minute
    python -m benchmarks.neighbors --full     # 65,536 images against 50,000; several minutes
    python -m benchmarks.neighbors --noise    # where no direction says more than another
    python -m benchmarks.neighbors --device cuda

Images are 3x32x32, made from Fashion-MNIST (Debian: dataset-fashion-mnist): padded, the channels shifted by a pixel, in
random colours on random grounds. The generated ones are others of these (half), blends of two training images, and
noisy training images (a quarter each). faiss searches one half of the queries before and one after our search, so that
whatever else the machine does weighs on both alike. Time includes all that a search does; faiss's includes `add`.

The memory is what our search takes at its peak beyond what the process held before, inputs included: so all of its
working memory, and its result. On a GPU the baseline is the matrix product alone.
"""

import argparse
import gzip
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from lightning_iet.functional.exhaustive_neighbors import RELATIVE_ERROR, pair_distances
from lightning_iet.functional.neighbors import nearest_neighbors
from lightning_iet.utilities.progress import progress_bar

FOLDER = Path("/usr/share/datasets/fashion-mnist")
LIMITS = {"cpu": 0.35, "cuda": 2.0}


def fashion(split: str) -> Tensor:
    """Read all images of a split, in [0, 1], padded to 32 by 32."""
    pixels = gzip.decompress((FOLDER / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
    grey = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(-1, 28, 28)
    return torch.nn.functional.pad(grey, (2, 2, 2, 2)).float() / 255


def coloured(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Give grey images a random colour on a random dark ground, and the three channels an offset."""
    channels = torch.stack([grey, grey.roll(1, dims=1), grey.roll(1, dims=2)], dim=1)
    colour = 0.3 + 0.7 * torch.rand(len(grey), 3, 1, 1, generator=generator)
    ground = 0.3 * torch.rand(len(grey), 3, 1, 1, generator=generator)
    return channels * (colour - ground) + ground


def pictures(num_queries: int, num_training: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make generated and training images."""
    originals, others = fashion("train"), fashion("t10k")
    choice = torch.arange(num_training) % 50_000
    training = coloured(originals[choice], generator)
    held_out = torch.cat([originals[50_000:], others])
    new = coloured(held_out[torch.randint(len(held_out), (num_queries // 2,), generator=generator)], generator)
    first, second, third = torch.randint(num_training, (3, num_queries // 4), generator=generator)
    share = torch.rand(len(first), 1, 1, 1, generator=generator)
    blends = torch.lerp(training[first], training[second], share)
    noise = torch.randn(len(third), 3, 32, 32, generator=generator)
    noisy = (training[third] + 0.1 * torch.rand(len(third), 1, 1, 1, generator=generator) * noise).clamp(0, 1)
    queries = torch.cat([new, blends, noisy])
    return queries[torch.randperm(len(queries), generator=generator)], training


def noise(num_queries: int, num_training: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make images in which no direction says more than another."""
    return tuple(torch.rand(n, 3, 32, 32, generator=generator) for n in (num_queries, num_training))


def status(field: str) -> float:
    """Return a field of the process's memory in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def search(queries: Tensor, training: Tensor, k: int, device: str) -> tuple[Tensor, Tensor, float, float]:
    """Return distances, indices, seconds and the GiB that were needed."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    start = perf_counter()
    with progress_bar("ours", len(queries)) as bar:
        found = nearest_neighbors(queries, training, k, device=device, progress=bar.show)
    if device == "cuda":
        torch.cuda.synchronize()
    return *found, perf_counter() - start, status("VmHWM") - before


def faiss_search(queries: Tensor, training: Tensor, k: int) -> tuple[Tensor, float]:
    """Return indices and seconds."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    start = perf_counter()
    index = faiss.IndexFlatL2(training[0].numel())
    index.add(training.flatten(1).numpy())
    _, found = index.search(queries.flatten(1).numpy(), k)
    return torch.from_numpy(found), perf_counter() - start


def check(queries: Tensor, training: Tensor, distances: Tensor, indices: Tensor, others: Tensor) -> None:
    """Compare our neighbours of some queries with faiss's, both measured in float64."""
    rows = torch.arange(0, len(queries), max(1, len(queries) // 512))
    k = indices.shape[1]
    pairs = queries.flatten(1), training.flatten(1), rows.repeat_interleave(k)
    ours, theirs = (
        pair_distances(*pairs, found[rows].flatten(), precise=True).view(-1, k) for found in (indices, others)
    )
    error = ((distances[rows] - ours).abs() / ours.clamp(min=1e-30)).max()
    farther = (ours / theirs.sort(dim=1).values.clamp(min=1e-30)).max() - 1
    same = (indices[rows] == others[rows]).double().mean()
    print(
        f"{len(rows)} queries checked: largest relative error {error:.1e}; our neighbours are at most {farther:.1e} "
        f"farther than faiss's; {same:.3%} are the same"
    )
    if error > RELATIVE_ERROR or farther > 1e-6:
        raise SystemExit("Not exact.")


def product_seconds(queries: Tensor, training: Tensor) -> float:
    """Time the matrix product alone on a GPU, in blocks that fit."""
    rows, columns = queries.flatten(1).cuda(), training.flatten(1).cuda()
    rows[:1024] @ columns.T
    torch.cuda.synchronize()
    start = perf_counter()
    for block in rows.split(1024):
        block @ columns.T
    torch.cuda.synchronize()
    return perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=16_384, help="generated images (default: %(default)s)")
    parser.add_argument("--training", type=int, default=25_000, help="training images (default: %(default)s)")
    parser.add_argument("--k", type=int, default=50, help="neighbours (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="65,536 generated and 50,000 training images")
    parser.add_argument("--noise", action="store_true", help="plain noise in place of images")
    parser.add_argument("--device", choices=LIMITS, default="cpu", help="where to search (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    args = parser.parse_args()
    sizes = (65_536, 50_000) if args.full else (args.queries, args.training)
    torch.set_num_threads(args.threads)

    queries, training = (noise if args.noise else pictures)(*sizes, torch.Generator().manual_seed(0))
    kind = "noise" if args.noise else "pictures"
    print(f"{len(queries)} generated, {len(training)} training images ({kind}), k={args.k}")
    if args.device == "cuda":
        queries, training = queries.cuda(), training.cuda()
        search(queries[:1024], training, args.k, args.device)
        baseline, name = product_seconds(queries, training), "matrix product"
        seconds = search(queries, training, args.k, args.device)[2]
    else:
        half = len(queries) // 2
        first, before = faiss_search(queries[:half], training, args.k)
        distances, indices, seconds, memory = search(queries, training, args.k, args.device)
        second, after = faiss_search(queries[half:], training, args.k)
        baseline, name = before + after, "faiss IndexFlatL2"
        check(queries, training, distances, indices, torch.cat([first, second]))
        print(f"memory beyond the inputs {memory:.2f} GiB (at most 3)")
    limit = "at most 1.05" if args.noise and args.device == "cpu" else f"at most {LIMITS[args.device]}"
    print(f"{name} {baseline:.2f} s, ours {seconds:.2f} s: ratio {seconds / baseline:.2f} ({limit})")


if __name__ == "__main__":
    main()
