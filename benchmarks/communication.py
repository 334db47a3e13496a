"""What shards send over the network, beside ordinary DDP, and what a link of 1 Gbit/s makes of it: a plan on paper.

python -m benchmarks.communication                    the table of docs/scaling.md
python -m benchmarks.communication --link 10          the same for 10 Gbit/s
"""

import argparse
from dataclasses import dataclass

from benchmarks.averaging import CIFAR_UNET
from lightning_iet.functional.averaging import NETWORK_CHUNK

SAMPLES, BATCH_SIZE, EPOCHS_PER_ROUND = 50_000, 128, 100  # IET on CIFAR-10, as published
BYTES = 4  # of a float32


@dataclass(frozen=True)
class Plan:
    """Bytes that each process sends, on average over the processes, and the time that takes."""

    processes: int
    parameters: int = CIFAR_UNET
    samples: int = SAMPLES
    batch_size: int = BATCH_SIZE
    epochs_per_round: int = EPOCHS_PER_ROUND
    gigabits: float = 1.0

    @property
    def steps(self) -> int:
        """Steps of a process in an epoch."""
        return -(-self.samples // (self.batch_size * self.processes))

    @property
    def share(self) -> float:
        """2 (W - 1) / W: what an all-reduce sends of each byte."""
        return 2 * (self.processes - 1) / self.processes

    @property
    def ddp_bytes(self) -> float:
        """DDP, per epoch: the gradients, in every step."""
        return self.steps * self.share * self.parameters * BYTES

    @property
    def averaging_bytes(self) -> float:
        """Shards, per averaging: weights and EMA."""
        return self.share * 2 * self.parameters * BYTES

    @property
    def shard_bytes(self) -> float:
        """Shards, per epoch."""
        return self.averaging_bytes / self.epochs_per_round

    @property
    def ddp_seconds(self) -> float:
        """Per epoch, if nothing of it is hidden behind the backward pass."""
        return self.ddp_bytes / self._bytes_per_second

    @property
    def averaging_seconds(self) -> float:
        """Per averaging: both directions of a link at once, and the way of one message along the chain and back."""
        message = NETWORK_CHUNK * BYTES
        way = 2 * (self.processes - 1) * message
        return (2 * self.parameters * BYTES + way) / self._bytes_per_second

    @property
    def _bytes_per_second(self) -> float:
        return self.gigabits * 1e9 / 8


def table(gigabits: float) -> str:
    """The plan for 8, 64 and 512 processes, in Markdown."""
    lines = [
        f"| processes | steps in an epoch | DDP: per epoch | at {gigabits:g} Gbit/s "
        f"| shards: per averaging | at {gigabits:g} Gbit/s | shards: per epoch | of DDP's |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for processes in (8, 64, 512):
        plan = Plan(processes, gigabits=gigabits)
        lines.append(
            f"| {processes} | {plan.steps} | {plan.ddp_bytes / 1e6:,.0f} MB | {plan.ddp_seconds:.1f} s "
            f"| {plan.averaging_bytes / 1e6:,.0f} MB | {plan.averaging_seconds:.1f} s "
            f"| {plan.shard_bytes / 1e6:.1f} MB | {plan.shard_bytes / plan.ddp_bytes:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=1.0, help="Gbit/s in each direction (default: 1)")
    print(table(parser.parse_args().link))


if __name__ == "__main__":
    main()
