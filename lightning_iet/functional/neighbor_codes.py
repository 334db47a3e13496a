r"""Short codes of images whose distances bound the distances of the images from below.

With an orthonormal basis :math:`B` of a few directions, an image has a projection :math:`p = B^\top (x - m)` and what
is left of it, a vector of norm :math:`r`. Projections and remainders are orthogonal, and remainders of norms :math:`r`
and :math:`r'` are at least :math:`|r - r'|` apart:

.. math:: \lVert x - x' \rVert^2 \ge \lVert p - p' \rVert^2 + (r - r')^2 = \lVert z - z' \rVert^2, \qquad z = (p, r).

In images most of the distance lies in their first principal components, so a code of 65 to 385 numbers rules out nearly
all of the pairs at a tenth of the cost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Codes", "Projection", "principal_directions"]

_VALUES = 2**20  # of images (8 MiB in float64) that are projected at a time


class Codes(NamedTuple):
    """Codes of a set of images, and what is needed to compare them safely.

    Attributes:
        z: projections and the norm of the rest, float32, shape ``(N, d + 1)``.
        norms: squared norms of ``z``, float64, shape ``(N,)``.
        slack: how far an image may be from what its code says, float64, shape ``(N,)``: distances of codes exceed
            distances of images by no more than the sum of both slacks.
    """

    z: Tensor
    norms: Tensor
    slack: Tensor


class Projection(NamedTuple):
    """Where codes are taken from.

    Attributes:
        mean: subtracted from every image, float64, shape ``(D,)``. Any will do; a mean keeps numbers small.
        basis: orthonormal columns, float64, shape ``(D, d)``, ``d <= 384``.
    """

    mean: Tensor
    basis: Tensor

    def codes(self, rows: Tensor) -> Codes:
        r"""Return the codes of images.

        Computed in float64 and rounded once. A component of :math:`p` has an error of at most :math:`2^{-53} D |x|`,
        so :math:`p` of 384 components one of :math:`20` times that, so :math:`r^2 = |x|^2 - |p|^2` one of at most
        :math:`42 \cdot 2^{-53} D |x|^2`, and :math:`r` one of :math:`6.9 \cdot 10^{-8} \sqrt{D} |x|`. With one rounding
        to float32 that is less than the slack, :math:`10^{-7} (\sqrt{D} + 1) |x|`.

        Args:
            rows: shape ``(N, D)``, uint8 (meaning value / 255) or floating point.

        Returns:
            The codes, on the same device.

        Example:
            >>> projection = Projection(torch.zeros(2).double(), torch.tensor([[1.0], [0.0]]).double())
            >>> projection.codes(torch.tensor([[0.5, 0.25]])).z
            tensor([[0.5000, 0.2500]])
        """
        z = torch.empty(len(rows), self.basis.shape[1] + 1, device=rows.device)
        lengths = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        step = max(1, _VALUES // max(1, rows.shape[1]))
        # One buffer for all steps: fresh memory for each costs several times the arithmetic.
        buffer = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
        for part, z_out, length_out in zip(rows.split(step), z.split(step), lengths.split(step), strict=True):
            centred = buffer[: len(part)].copy_(part)
            if rows.dtype == torch.uint8:
                centred.div_(255)
            projected = centred.sub_(self.mean) @ self.basis
            torch.linalg.vector_norm(centred, dim=1, out=length_out)
            squared = length_out.square() - projected.square().sum(dim=1)
            z_out[:, :-1], z_out[:, -1] = projected, squared.clamp_(min=0).sqrt_()
        return Codes(z, z.double().square().sum(dim=1), 1e-7 * (rows.shape[1] ** 0.5 + 1) * lengths)


def principal_directions(rows: Tensor, number: int) -> Projection:
    """Return a projection on about the first principal components of a sample of images, the same at every call.

    Two rounds of subspace iteration from a random start (Halko, Martinsson, Tropp 2011, algorithm 4.4). How close they
    are to the components decides how much a search saves, never what it finds.

    Args:
        rows: shape ``(N, D)``, uint8 or floating point.
        number: of components, at most ``N`` and ``D``.

    Returns:
        A projection with components in descending order of variance.

    Example:
        >>> line = torch.linspace(0, 1, 20)[:, None] * torch.tensor([[0.6, 0.8]])
        >>> principal_directions(line, 1).basis.abs()
        tensor([[0.6000], [0.8000]], dtype=torch.float64)
    """
    sample = rows.float().div_(255) if rows.dtype == torch.uint8 else rows.float()
    mean = sample.mean(dim=0)
    sample = sample - mean
    start = torch.randn(len(rows), number, generator=torch.Generator().manual_seed(0)).to(rows.device)
    span = torch.linalg.qr(sample.T @ start).Q
    span = torch.linalg.qr(sample.T @ (sample @ span)).Q
    turn = torch.linalg.svd(sample @ span, full_matrices=False).Vh.T
    # Once more in float64, to make the columns orthonormal to 15 digits.
    return Projection(mean.double(), torch.linalg.qr((span @ turn).double()).Q)
