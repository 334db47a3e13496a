"""What an averaging of shard models costs, beside the least that it could cost.

python -m benchmarks.averaging                      4 shards in one process, against one copy of their bytes
python -m benchmarks.averaging --processes 2        over processes, against one all-reduce of the same bytes
python -m benchmarks.averaging --processes 2 --device cuda    the same over NCCL, a GPU for each process
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from lightning_iet.functional.averaging import average_

CIFAR_UNET = 35_746_307  # parameters of the U-Net of DDPM on CIFAR-10, the model of the paper


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median times of several functions that take turns, so that a drift of the machine meets them alike."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, measured in zip(functions, times, strict=True):
            measured.append(seconds(function))
            if turn == 0:
                measured.clear()  # warm-up
    return [statistics.median(measured) for measured in times]


def in_one_process(shards: int, parameters: int, repeats: int) -> tuple[list[str], list[float]]:
    """An averaging, and reading and writing the same bytes once."""
    copies = [torch.randn(parameters) for _ in range(shards)]
    source, target = torch.randn(shards * parameters), torch.empty(shards * parameters)
    sizes = [1.0] * shards
    times = interleaved([lambda: average_(copies, sizes), lambda: target.copy_(source)], repeats)
    return [f"averaging of {shards} shards", "one copy of their bytes"], times


def over_processes(
    rank: int, processes: int, parameters: int, repeats: int, kind: str, store: str, result: str
) -> None:
    """One process of the distributed measurement; rank 0 writes the times."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=processes)
    copy, flat = torch.randn(parameters, device=device), torch.randn(parameters, device=device)

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    def averaging() -> None:
        dist.barrier()
        average_([copy], [1.0] * processes, group=dist.group.WORLD)
        wait()

    def all_reduce() -> None:
        dist.barrier()
        dist.all_reduce(flat)
        wait()

    times = interleaved([averaging, all_reduce], repeats)
    if rank == 0:
        torch.save(times, result)
    dist.destroy_process_group()


def main() -> None:
    """Measure, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="one shard on each (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of several processes (default: cpu)")
    parser.add_argument("--shards", type=int, default=4, help="shards in one process (default: 4)")
    parser.add_argument("--parameters", type=int, default=CIFAR_UNET, help="of one shard (default: 35.7 M)")
    parser.add_argument("--repeats", type=int, default=7, help="counted turns; the median is printed (default: 7)")
    options = parser.parse_args()
    if options.processes == 1:
        names, times = in_one_process(options.shards, options.parameters, options.repeats)
        bound = 2.0
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (options.processes, options.parameters, options.repeats, options.device)
            mp.spawn(over_processes, args=(*arguments, f"{folder}/store", f"{folder}/times"), nprocs=options.processes)
            times = torch.load(f"{folder}/times")
        names, bound = [f"averaging over {options.processes} processes", "one all-reduce of the same bytes"], 1.2
    table = Table("measured", "median", title=f"{options.parameters / 1e6:.1f} M parameters, float32")
    for name, measured in zip(names, times, strict=True):
        table.add_row(name, f"{measured * 1e3:.1f} ms")
    Console().print(table)
    print(f"ratio {times[0] / times[1]:.2f} (at most {bound} is wanted)")


if __name__ == "__main__":
    main()
