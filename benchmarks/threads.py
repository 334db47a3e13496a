"""Training steps on one thread and on all of them, alone and beside busy processes: from what size on threads pay.

    python -m benchmarks.threads
    python -m benchmarks.threads --busy 2

Of U-Nets from that of the digits to one with four million parameters, on images of several sizes. Blocks of steps on
one thread alternate with blocks on all, first alone, then beside processes that do nothing but count. A ratio above 1
says that one thread is faster. Beside it stands what `lightning-iet fit` chooses. The last line is sampling, which an
evaluation does in larger batches than training.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from diffusers import UNet2DModel

from lightning_iet import DiffusionModule
from lightning_iet.utilities.devices import is_small, multiply_adds

# Side of the images, channels of them, channels of the two blocks, batch size
NETWORKS = (
    (8, 1, (32, 64), 14),
    (8, 1, (32, 64), 64),
    (16, 1, (32, 64), 16),
    (16, 1, (32, 64), 64),
    (28, 1, (32, 64), 16),
    (32, 3, (32, 64), 64),
    (8, 1, (64, 128), 14),
    (16, 3, (64, 128), 16),
    (8, 1, (80, 160), 14),
)
BUSY = "while True: pass"


def make_module(size: int, channels: int, widths: tuple[int, int]) -> DiffusionModule:
    """Make a module like that of the digits."""
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return DiffusionModule(unet, ema_decay=0.995)


def training(module: DiffusionModule, batch_size: int) -> Callable[[], object]:
    """Return a function that takes a step."""
    optimizer = torch.optim.Adam(module.unet.parameters(), lr=1e-3, fused=True)
    images = torch.rand(batch_size, *module.image_shape)
    module.ema.follow(module.unet)

    def step() -> None:
        timesteps = torch.randint(module.num_timesteps, (batch_size,))
        loss = module.losses(images, timesteps, torch.randn_like(images)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.ema.update()

    return step


def milliseconds(work: Callable[[], object], threads: Sequence[int], *, seconds: float) -> list[float]:
    """Return the median time of a step for each number of threads, in blocks that alternate."""
    times: dict[int, list[float]] = {number: [] for number in threads}
    end = perf_counter() + seconds * len(threads)
    while perf_counter() < end or not all(times.values()):
        for number in threads:
            torch.set_num_threads(number)
            work()  # on which the threads are started
            block = perf_counter() + seconds / 8
            while perf_counter() < block or not times[number]:
                start = perf_counter()
                work()
                times[number].append(1e3 * (perf_counter() - start))
    return [statistics.median(values) for values in times.values()]


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep so many processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each figure (default: %(default)s)")
    options = parser.parse_args()
    threads = (1, torch.get_num_threads())
    print(f"Milliseconds of a step on 1 and on {threads[1]} threads, alone and beside {options.busy} busy process(es)")
    print(f"{'parameters':>18} {'images':>14} {'multiply-adds':>14} {'alone':>28} {'beside others':>28} chosen")
    for size, channels, widths, batch_size in NETWORKS:
        torch.manual_seed(0)
        module = make_module(size, channels, widths)
        works = [("", training(module, batch_size))]
        if (size, widths, batch_size) == (8, (32, 64), 14):
            works.append(("sampling ", lambda module=module: module.sample(256, num_inference_steps=2)))
        for name, work in works:
            figures = milliseconds(work, threads, seconds=options.seconds)
            with busy(options.busy):
                figures += milliseconds(work, threads, seconds=options.seconds)
            number = 256 if name else batch_size
            cells = (f"{one:.1f} {all_:.1f} ({all_ / one:.2f})" for one, all_ in (figures[:2], figures[2:]))
            chosen = "" if name else "1" if is_small(module, number) else "all"
            parameters = sum(p.numel() for p in module.unet.parameters())
            print(
                f"{name + format(parameters, ','):>18} {f'{number} x {channels}x{size}x{size}':>14} "
                f"{multiply_adds(module, number) / 1e9:>12.2f} G {' '.join(f'{cell:>28}' for cell in cells)} {chosen}",
                flush=True,
            )


if __name__ == "__main__":
    main()
