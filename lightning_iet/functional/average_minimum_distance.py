"""Average minimum cosine distance of generated images from the training set, in a feature space."""

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_features
from lightning_iet.functional.exhaustive_neighbors import squared_norms
from lightning_iet.functional.neighbors import search_rows

_FLOATS = 2**22  # values (32 MiB) that are held in float64 at a time


def unit_rows(features: Tensor) -> Tensor:
    """Scale every row, shape ``(N, D)``, to length one in float32; a row of zeros stays."""
    scaled = torch.empty_like(features, dtype=torch.float32)
    length = max(1, _FLOATS // max(1, features.shape[1]))
    for rows, out in zip(features.split(length), scaled.split(length), strict=True):
        wide = rows.double()  # so that equal directions of unequal length come out equal
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        out.copy_(wide / norms.where(norms > 0, 1))
    return scaled


def nearest_cosine_distance(generated: Tensor, train: Tensor, *, norms: Tensor | None = None) -> Tensor:
    r"""Return the cosine distance of every row to the nearest training row.

    .. math:: c(\hat x) = \min_j \big(1 - \cos(\hat x, x_j)\big) = \tfrac12 \min_j \lVert \hat x - x_j \rVert^2

    for rows of length one. Computed as the right-hand side, whose error is at most about ``2e-7 sqrt(c)``, since the
    rows are rounded to float32: 0.2 % of a distance of 1e-8, where ``1 - cos`` in float32 is off by the distance
    itself, and all of one below 1e-13. A row of zeros has no direction: as a generated row it is at distance 1 from
    everything, as a training row it is no neighbour *(our choice)*.

    Args:
        generated: rows of :func:`unit_rows`, shape ``(Q, D)``.
        train: rows of :func:`unit_rows`, shape ``(N, D)``.
        norms: the squared norms of ``train``, shape ``(N,)``, if at hand.

    Returns:
        Shape ``(Q,)``, in [0, 2].

    Example:
        >>> nearest_cosine_distance(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        tensor([1.0000, 0.2000])
    """
    norms = squared_norms(train) if norms is None else norms
    if (norms == 0).any():
        train, norms = train[norms > 0], norms[norms > 0]
    if len(train) == 0:
        return torch.ones(len(generated), device=generated.device)
    sq_distances, _ = search_rows(generated, train, 1, norms=norms, ties=False)
    return torch.where(generated.any(dim=1), sq_distances[:, 0] / 2, 1)


def average_minimum_distance(generated: Tensor, train: Tensor) -> Tensor:
    r"""Average the minimum cosine distance of generated features to training features.

    .. math:: \mathrm{AMD} = \frac1Q \sum_{\hat x} \min_j \Big(1 - \frac{\langle f(\hat x), f(x_j) \rangle}
        {\lVert f(\hat x) \rVert \, \lVert f(x_j) \rVert}\Big)

    (Dutt et al., *MemControl*, WACV 2025, arXiv:2405.19458.)

    Args:
        generated: features, shape ``(Q, D)``, floating point.
        train: features, shape ``(N, D)``, likewise.

    Returns:
        0-d tensor in [0, 2], NaN if there are no generated images. The order of the rows does not change a bit of it.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.checks.check_features`.

    Example:
        >>> average_minimum_distance(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 5.0]]))
        tensor(0.6000)
    """
    check_features(generated=generated, train=train)
    distances = nearest_cosine_distance(unit_rows(generated), unit_rows(train))
    return distances.double().sort().values.mean().float()
