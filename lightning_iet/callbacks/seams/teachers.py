"""Telling consistency training, whose targets are outputs of a denoiser too."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_iet.callbacks.seams.denoiser_call import is_sample, one_per_row, tensors_in

__all__ = ["Teachers"]


class Teachers:
    """Remembers outputs that modules made without gradients, and sees whether one is compared with the denoiser's.

    Attributes:
        compared: Whether an operation had such an output and a tensor that needs a gradient.
    """

    def __init__(self) -> None:
        self.compared = False
        self._outputs: list[Tensor] = []

    def add(self, arguments: Mapping[str, Any], output: Any) -> bool:
        """Remember what a call without gradients returned; return whether it looks like a denoiser's."""
        shapes = [value.shape for value in arguments.values() if is_sample(value)]
        per_row = [
            value
            for value in arguments.values()
            if isinstance(value, Tensor) and any(one_per_row(value, shape[0]) for shape in shapes)
        ]
        found = [tensor for tensor in tensors_in(output) if per_row and tensor.shape in shapes]
        self._outputs += found
        return bool(found)

    def forget(self) -> None:
        """Let go of the outputs; there is nothing more to see."""
        self._outputs = []

    def look(self, arguments: Iterable[Any]) -> None:
        """Look at the arguments of an operation behind the denoiser."""
        tensors = [value for value in arguments if type(value) is Tensor]
        if self._outputs and any(tensor.requires_grad for tensor in tensors):
            places = {output.data_ptr() for output in self._outputs}
            self.compared |= any(not tensor.requires_grad and tensor.data_ptr() in places for tensor in tensors)
