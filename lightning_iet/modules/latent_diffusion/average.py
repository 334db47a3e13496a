"""The exponential moving average of those weights that are trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["TrainedAverage"]


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
