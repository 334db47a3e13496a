"""What MemorizedQuantity costs over the least that any exact method must do.

    python -m benchmarks.memorized_quantity

The baseline is one float32 matrix product of generated and training images, and a top-k of its rows. Both sides are
timed in turns, so that whatever else the machine does slows them alike, and their medians are compared.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from lightning_iet.metrics import MemorizedQuantity

LIMIT = 1.15


def milliseconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (perf_counter() - start)


def compare(*, num_train: int, num_generated: int, size: int, k: int, repeats: int) -> dict[str, list[float]]:
    """Time the baseline and the metric in turns on random images, after two rounds to warm up."""
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(num_train, 3, size, size, generator=generator)
    generated = torch.rand(num_generated, 3, size, size, generator=generator)
    metric = MemorizedQuantity(train, k=k)

    def baseline() -> object:
        return (generated.flatten(1) @ train.flatten(1).T).topk(k, largest=False)

    def measured() -> object:
        metric.reset()
        metric.update(generated)
        return metric.compute()

    sides = {"matrix product + top-k": baseline, "MemorizedQuantity": measured}
    rounds = [{name: milliseconds(work) for name, work in sides.items()} for _ in range(repeats + 2)]
    return {name: [times[name] for times in rounds[2:]] for name in sides}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=5120, help="training images (default: %(default)s)")
    parser.add_argument("--generated", type=int, default=256, help="generated images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--k", type=int, default=50, help="neighbours in the ratio (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count (default: %(default)s)")
    args = parser.parse_args()

    times = compare(num_train=args.train, num_generated=args.generated, size=args.size, k=args.k, repeats=args.repeats)
    print(f"{args.generated} generated, {args.train} training images, 3x{args.size}x{args.size}, k={args.k}\n")
    print(f"{'':24}{'median ms':>10}{'fastest ms':>12}")
    for name, values in times.items():
        print(f"{name:24}{median(values):10.1f}{min(values):12.1f}")
    baseline, measured = (median(values) for values in times.values())
    print(f"\nratio of medians {measured / baseline:.2f} (at most {LIMIT})")


if __name__ == "__main__":
    main()
