"""Whether what shards share stays as it is."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_iet.shards.state import frozen_tensors

__all__ = ["FrozenWatch"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class FrozenWatch:
    """Remembers a number for each tensor that shards share, and refuses to go on when one has changed.

    Args:
        module: About to be trained.

    Example:
        >>> module = nn.Linear(2, 2).requires_grad_(False)
        >>> watch = FrozenWatch(module)
        >>> watch.check()
        >>> module.bias.data += 1
        >>> watch.check()
        Traceback (most recent call last):
        ...
        lightning.fabric.utilities.exceptions.MisconfigurationException: ParameterAveragingCallback expected ...
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = frozen_tensors(module)
        self._before = self._prints()

    def check(self) -> None:
        """Compare.

        Raises:
            MisconfigurationException: If a tensor is not what it was: the next shard would start from it.
        """
        changed = (self._prints() != self._before).tolist()
        names = [name for name, change in zip(self._tensors, changed, strict=True) if change]
        if names:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected frozen tensors to stay as they are, but got changes of "
                f"{len(names)}, '{names[0]}' the first: shards would share them. Keep an average of weights as a deep "
                "copy of the whole network, or as torch.optim.swa_utils.AveragedModel; keep other state as buffers of "
                "a module that is trained."
            )

    def _prints(self) -> Tensor:
        """The sum of each tensor's bits, read as integers."""
        return torch.stack([torch.zeros((), dtype=torch.int64), *map(_print, self._tensors.values())])[1:]


def _print(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
