"""What both diffusion modules share."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng


class ClipsFusedGradients:
    """Lets gradients be clipped under ``precision="bf16-mixed"`` with a fused optimizer: mixed into a LightningModule.

    Lightning refuses fused optimizers whenever precision is mixed, for they undo the scaling of gradients themselves,
    after the clipping. In bfloat16 nothing is scaled: there is nothing to wait for.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before each optimizer step."""
        module: Any = self
        plugin = module.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class DrawsAfresh:
    """Mixed into a LightningModule: every process draws its own numbers, and a resumed run new ones.

    Lightning seeds all processes alike, so that under plain DDP all would draw the same timesteps and the same noise
    for their different images; and it does not keep the state of generators, so that a run that is resumed again and
    again would train on the same draws for ever. The first process of a new run is left as it was seeded. Under shards
    every step is seeded anyway.
    """

    def on_train_start(self) -> None:
        """Seed from (seed of the run, rank, steps so far)."""
        trainer: pl.Trainer = self.trainer  # type: ignore[attr-defined]
        if trainer.global_rank or trainer.global_step:
            seed_rng(derive_seed(torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step))


def moving_average(unet: nn.Module, decay: float) -> AveragedModel:
    """A copy of a denoiser that is to follow it; it takes no gradients.

    Example:
        >>> moving_average(nn.Linear(1, 1), 0.9).module.weight.requires_grad
        False
    """
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return ema.requires_grad_(False)


class MovingAverage:
    """``ema <- d · ema + (1 - d) · unet``, from the first step on.

    ``AveragedModel.update_parameters`` asks a tensor on the device whether this is the first update: a wait for the
    device in every step. The arithmetic is the same; a first update that copies is not needed, for the average starts
    as a copy.

    Args:
        ema: Of :func:`moving_average`.
        unet: What it follows. Its tensors are listed once: walking through a model takes as long as averaging it.
    """

    def __init__(self, ema: AveragedModel, unet: nn.Module) -> None:
        self.count = ema.n_averaged
        self.average: Any = ema.multi_avg_fn
        self.parameters = list(ema.module.parameters()), list(unet.parameters())
        self.buffers = list(zip(ema.module.buffers(), unet.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one optimizer step; buffers are copied."""
        self.average(*self.parameters, self.count)
        for averaged, buffer in self.buffers:
            averaged.copy_(buffer)
        self.count += 1


class TrainedAverage(AveragedModel):
    r"""Keeps :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta` of a network's trainable parameters alone.

    Frozen weights have no second copy: with adapters (LoRA) the average is as small as they are.

    Args:
        network: What is trained; parameters that require gradients are averaged.
        decay: :math:`d`, in [0, 1).

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1, bias=False))
        >>> average = TrainedAverage(network, decay=0.5)
        >>> before = network[1].weight.item()
        >>> with torch.no_grad():
        ...     _ = network[1].weight.add_(1)
        >>> average.update(list(network[1].parameters()))
        >>> round(average.module[0].item() - before, 6), len(average.module)
        (0.5, 1)
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        super().__init__(nn.ParameterList(trained.values()), multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.requires_grad_(False)
        self.names = list(trained)

    @torch.no_grad()
    def update(self, trained: Sequence[nn.Parameter]) -> None:
        """Take in the weights of one optimizer step.

        ``AveragedModel.update_parameters`` would ask a tensor on the device whether this is the first update. The
        average starts as a copy: no update is special.

        Args:
            trained: The network's trainable parameters, in its order.
        """
        averaged: Any = self.multi_avg_fn
        averaged(list(self.module.parameters()), list(trained), self.n_averaged)
        self.n_averaged += 1

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by the names that they have in the network."""
        return dict(zip(self.names, self.module.parameters(), strict=True))

    def call(self, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the network as if it had the averaged weights."""
        return functional_call(network, self.weights(), args, kwargs)
