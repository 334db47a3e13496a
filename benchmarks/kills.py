"""What is left of runs that are killed again and again, at random moments and while they write checkpoints.

python -m benchmarks.kills                  50 kills on one process and 50 on two; needs no GPU
python -m benchmarks.kills --kills 10 --seed 7
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the same bits need equally many threads

import torch
from rich.console import Console
from rich.table import Table

from tests.helpers.kills import Session, kill_again_and_again

BALLAST = 4_000_000  # frozen parameters: checkpoints of 17 MB, which take a while to write


def same(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether final weights are those of the run that was not disturbed, bit for bit."""
    weights = torch.load(path)
    return all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def measure(processes: int, kills: int, seed: int, uncut: dict[str, torch.Tensor]) -> list[str]:
    """One row of the table."""
    results = []
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        tally = kill_again_and_again(
            folder,
            kills,
            lambda folder: results.append(same(folder / "final.pt", uncut)),
            seed=seed,
            world_size=processes,
            ballast=BALLAST,
        )
        if Session(folder, processes, ballast=BALLAST).wait(120):
            raise RuntimeError("The last run did not reach its end.")
        results.append(same(folder / "final.pt", uncut))
        assert all(results), f"Of {len(results)} runs, {results.count(False)} ended in other bits."
        seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(folder)
    return [
        str(processes),
        str(tally.kills),
        str(tally.half_written),
        f"{statistics.mean(tally.lost):.2f} / {max(tally.lost)}",
        f"{sum(results)} of {len(results)}",
        f"{seconds:.0f} s",
    ]


def main() -> None:
    """Kill, and print what came of it; any torn checkpoint, orphan or wrong start ends the benchmark with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each number of processes (default: 50)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if Session(Path(folder), ballast=BALLAST).wait(120):
            raise RuntimeError("The undisturbed run did not reach its end.")
        uncut = torch.load(Path(folder, "final.pt"))
    columns = (
        "processes",
        "kills",
        "met a file half-written",
        "steps lost: mean / most",
        "runs with the same bits",
        "took",
    )
    table = Table(*columns, title="A checkpoint after every step; torn files under a final name: 0, orphans: 0")
    for processes in options.processes:
        table.add_row(*measure(processes, options.kills, options.seed, uncut))
    Console().print(table)


if __name__ == "__main__":
    main()
