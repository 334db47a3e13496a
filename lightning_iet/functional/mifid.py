"""Memorization-informed Fréchet distance, in the direction that sees memorization."""

import torch
from torch import Tensor

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.frechet import frechet_distance, moments

__all__ = ["memorization_distances", "mifid", "penalized"]

_EPSILON = 1e-14


def mifid(generated: Tensor, train: Tensor, *, threshold: float = 0.1) -> Tensor:
    r"""Divide the Fréchet distance by the memorization distance, where that is small.

    .. math::
        \mathrm{MiFID} = \frac{\mathrm{FID}}{m_\tau}, \qquad
        m = \frac1Q \sum_{\hat x} \min_j \big(1 - |\cos(f(\hat x), f(x_j))|\big), \qquad
        m_\tau = \begin{cases} m + \varepsilon & m < \tau \\ 1 & \text{otherwise} \end{cases}

    (Bai et al., *On Training Sample Memorization*, KDD 2021, arXiv:2106.03062.) The minimum runs over the **training**
    images. torchmetrics takes it over the generated ones, for each training image: a generator that emits one training
    image for ever is then far from most of them, and goes unpunished.

    Args:
        generated: features, shape ``(Q, D)``, ``Q >= 2``.
        train: features of the training images, shape ``(N, D)``, ``N >= 2``.
        threshold: :math:`\tau`, the mean distance from which on there is no penalty. It belongs to one feature space.

    Returns:
        0-d tensor, at least 0.

    Example:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> mifid(train + torch.tensor([0.0, 0.1]), train) / mifid(train + 0.1, train, threshold=0) > 100
        tensor(True)
    """
    memorization = memorization_distances(unit_rows(generated), unit_rows(train)).double().sort().values.mean()
    return penalized(frechet_distance(moments(generated), moments(train)), memorization, threshold=threshold).float()


def memorization_distances(generated: Tensor, train: Tensor, *, norms: Tensor | None = None) -> Tensor:
    r"""Return :math:`\min_j (1 - |\cos|)` for every generated row.

    Args:
        generated: rows of :func:`~lightning_iet.functional.average_minimum_distance.unit_rows`, shape ``(Q, D)``.
        train: likewise, shape ``(N, D)``.
        norms: the squared norms of ``train``, if at hand.

    Returns:
        Shape ``(Q,)``, in [0, 1].

    Example:
        >>> memorization_distances(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, -1.0]]))
        tensor([0.2000])
    """
    distances = nearest_cosine_distance(generated, train, norms=norms)
    if (generated < 0).any() or (train < 0).any():  # otherwise no cosine is negative, as with Inception's features
        distances = torch.minimum(distances, nearest_cosine_distance(-generated, train, norms=norms))
    return distances


def penalized(fid: Tensor, memorization: Tensor, *, threshold: float) -> Tensor:
    """Divide a Fréchet distance by the memorization distance, if that lies below the threshold.

    Args:
        fid: the Fréchet distance, 0-d.
        memorization: the mean memorization distance, 0-d.
        threshold: from which on there is no penalty.

    Returns:
        0-d tensor. A Fréchet distance below 1e-8 gives 0, as in torchmetrics: 0 / 0 says nothing.

    Example:
        >>> penalized(torch.tensor(3.0), torch.tensor(0.05), threshold=0.1)
        tensor(60.)
    """
    factor = torch.where(memorization < threshold, memorization + _EPSILON, 1)
    return torch.where(fid > 1e-8, fid / factor, 0)
