"""Which row of a denoiser's output each measured loss depends on, told from gradients instead of trusted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "layouts", "row_maps"]

_UNKNOWN = -1


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a tensor of errors: on an axis, alone, or merged with others into one.

    Attributes:
        axis: The axis that holds the samples.
        major: Whether the samples are the slower one of what was merged into it, as in ``(b h w)``.
        whole: Whether the axis holds all rows of the denoiser's output; else it holds a loss per entry.
    """

    axis: int = 0
    major: bool = True
    whole: bool = True

    def rows(self, errors: Tensor, batch_size: int) -> Tensor:
        """One row of errors per loss, shape (n, k)."""
        size = batch_size if self.whole else errors.shape[self.axis]
        split = errors.unflatten(self.axis, (size, -1) if self.major else (-1, size))
        return split.movedim(self.axis if self.major else self.axis + 1, 0).reshape(size, -1)

    def fits(self, errors: Tensor, batch_size: int) -> bool:
        """Whether a tensor can be laid out so."""
        if self.axis >= errors.ndim:
            return False
        size = errors.shape[self.axis]
        return size > 0 and size % batch_size == 0 if self.whole else 0 < size < batch_size


def layouts(errors: Tensor, batch_size: int) -> Iterator[Layout]:
    """The layouts that a tensor of errors may have, the usual one first."""
    candidates = [Layout(axis, major) for major in (True, False) for axis in range(errors.ndim)]
    for layout in [*candidates, Layout(whole=False)]:
        if layout.fits(errors, batch_size):
            yield layout


def row_maps(rows: Tensor, outputs: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    r"""For each row of each output, tell the one loss that depends on it.

    Row-local means :math:`\partial l_i / \partial o_j = 0` unless :math:`i = m(j)`. Loss :math:`i` is weighted by 2
    where a bit of :math:`i` is set and by 1 elsewhere; the gradient at row :math:`j` must then be exactly once or twice
    what it is with all weights 1, and which of them is that bit of :math:`m(j)`. So :math:`1 + \log_2 n` passes through
    the tail of the graph compare all pairs of rows. It waits for the device.

    Args:
        rows: Errors behind the outputs, shape (n, k), one row per loss, with a graph that is kept.
        outputs: For each call of the denoiser the tensors that it returned, each with B rows.

    Returns:
        For each call the number of the loss by row, (B,), on the CPU, -1 where no gradient arrives; None if some row
        has a part in several losses.

    Example:
        >>> out = torch.ones(4, 2, requires_grad=True)
        >>> row_maps(out.square().flip(0), [[out]])
        [tensor([3, 2, 1, 0])]
        >>> row_maps(out.square() / out.square().mean(), [[out]]) is None
        True
    """
    losses = rows.sum(1)  # sums: means of half precision would vanish
    tensors = [tensor for call in outputs for tensor in call]
    lengths = [len(call) for call in outputs]

    def gradients(weights: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(losses, tensors, weights, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
        flat = iter([_real(gradient).flatten(1) for gradient in filled])
        return [torch.cat([next(flat).double() for _ in range(length)], 1) for length in lengths]

    once = gradients(torch.ones_like(losses))
    tolerance = math.sqrt(torch.finfo(tensors[0].dtype).eps)
    maps = [torch.zeros(len(gradient), dtype=torch.long) for gradient in once]
    numbers = torch.arange(len(losses), device=losses.device)
    for bit in range((len(losses) - 1).bit_length()):
        weighted = gradients(1 + (numbers >> bit & 1).to(losses.dtype))
        for found, ones, row_map in zip(weighted, once, maps, strict=True):
            limit = tolerance * ones.abs().amax(1)
            single, double = ((found - times * ones).abs().amax(1) <= limit for times in (1, 2))
            if not (single | double | ~ones.isfinite().all(1)).all():
                return None
            row_map += (double & ~single).cpu().long() << bit
    return [torch.where(_live(ones).cpu(), row_map, _UNKNOWN) for ones, row_map in zip(once, maps, strict=True)]


def _live(gradients: Tensor) -> Tensor:
    """Rows that tell something: neither all zero nor broken."""
    return gradients.isfinite().all(1) & gradients.ne(0).any(1)


def _real(gradients: Tensor) -> Tensor:
    return torch.view_as_real(gradients) if gradients.is_complex() else gradients
