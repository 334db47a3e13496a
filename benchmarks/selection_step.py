"""What a selection of parameters costs: the time of a training step under it over that of a step of the whole network.

    python -m benchmarks.selection_step                    # the CIFAR-10 U-Net of DDPM, 35.7 M parameters, batch 64
    python -m benchmarks.selection_step --batch-size 8
    python -m benchmarks.selection_step --small            # a U-Net that takes milliseconds a step

Steps of all kinds alternate, and on a CPU the time is that of the processor, so that other work on the machine changes
little; the ratio is that of the medians. The optimizer's memory is that of its state after a step, over that of the
whole network's, beside the share of the parameters that train: the two are to agree within five per cent.
"""

import argparse
import copy
import statistics
import time

import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from lightning_iet.modules.adapters import Selection, select_parameters
from lightning_iet.modules.svdiff import spectral_shifts

FAMILIES = ("all", "attention", "norm", "bias", "norm_bias", "lora", "difffit", "svdiff")
LIMITS = {"attention": 1.0, "norm": 1.0, "bias": 1.0, "lora": 1.0, "svdiff": 1.25}  # of the time, at batch 64
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
SMALL = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8} | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


class Training:
    """Steps of one family."""

    def __init__(self, stock, family):
        self.network = copy.deepcopy(stock)
        start = time.perf_counter()
        select_parameters(self.network, Selection(family))
        self.preparation = time.perf_counter() - start
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.seconds = []

    def step(self, images):
        """Take a step, and the time."""
        clock = time.perf_counter if images.is_cuda else time.process_time
        start = clock()
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=images.device)
        loss = F.mse_loss(self.network(images + noise, timesteps).sample, noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(clock() - start)

    @property
    def moments(self):
        """Bytes of the optimizer's state."""
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in values if value.ndim)


def main():
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small U-Net")
    parser.add_argument("--steps", type=int, default=5, help="of each family")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SMALL if arguments.small else CIFAR
    stock = UNet2DModel(**settings)
    names = dict.fromkeys(("all", *arguments.families))
    trainings = {family: Training(stock, family) for family in names}
    images = torch.rand(arguments.batch_size, 3, settings["sample_size"], settings["sample_size"], device=device)
    for training in trainings.values():
        training.network.to(device)
    for _ in range(arguments.steps + 1):  # the first makes room
        for training in trainings.values():
            training.step(images)

    whole = trainings["all"]
    print(f"{whole.trained / 1e6:.1f} M parameters, batch {len(images)}, {arguments.steps} steps of each on {device}\n")
    print(f"{'family':<12}{'step':>12}{'ratio':>8}{'limit':>8}{'trained':>12}{'moments':>14}{'prepared in':>14}")
    base = statistics.median(whole.seconds[1:])
    for family, training in trainings.items():
        step = statistics.median(training.seconds[1:])
        limit = LIMITS.get(family, "") if arguments.batch_size >= 64 else ""
        agreement = (training.moments / whole.moments) / (training.trained / whole.trained)
        print(
            f"{family:<12}{step * 1e3:>9.0f} ms{step / base:>8.3f}{limit:>8}{training.trained / whole.trained:>12.5f}"
            f"{agreement:>8.3f} × it{training.preparation:>12.2f} s"
        )
    bases = (
        sum(shift.basis.nbytes for shift in spectral_shifts(trainings["svdiff"].network).values())
        if ("svdiff" in trainings)
        else 0
    )
    if bases:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in stock.parameters())
        print(f"\nSV-DIFF's bases: {bases / 2**20:.1f} MiB, {bases / weights:.2f} of the weights")


if __name__ == "__main__":
    main()
