"""Memorization-informed Fréchet distance, in the direction that sees memorization."""

import torch
from torch import Tensor

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.checks import check_features, check_number
from lightning_iet.functional.frechet import frechet_distance, moments

__all__ = ["check_threshold", "memorization_distances", "mifid", "penalized"]

_EPSILON = 1e-14  # added to the memorization distance, as published
_TINY = 1e-8  # Fréchet distances below this are rounding errors


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
        0-d tensor, at least 0; infinite for a perfect copy of the training set.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.checks.check_features`.
        ValueError: as :func:`~lightning_iet.functional.checks.check_features` and :func:`check_threshold`; if a set has
            fewer than two images, and hence no covariance.

    Example:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> mifid(train + torch.tensor([0.0, 0.1]), train) / mifid(train + 0.1, train, threshold=0) > 100
        tensor(True)
    """
    check_threshold(threshold)
    check_features(generated=generated, train=train)
    for name, rows in (("generated", generated), ("train", train)):
        if len(rows) < 2:
            raise ValueError(f"Argument `{name}` expected at least 2 images, but got {len(rows)}. Add images.")
    memorization = memorization_distances(unit_rows(generated), unit_rows(train)).double().sort().values.mean()
    return penalized(frechet_distance(moments(generated), moments(train)), memorization, threshold=threshold).float()


def memorization_distances(
    generated: Tensor, train: Tensor, *, norms: Tensor | None = None, signed: bool | None = None
) -> Tensor:
    r"""Return :math:`\min_j (1 - |\cos|)` for every generated row.

    Args:
        generated: rows of :func:`~lightning_iet.functional.average_minimum_distance.unit_rows`, shape ``(Q, D)``.
        train: likewise, shape ``(N, D)``.
        norms: as :func:`~lightning_iet.functional.average_minimum_distance.nearest_cosine_distance`.
        signed: whether ``train`` has negative values, if that is known.

    Returns:
        Shape ``(Q,)``, in [0, 1].

    Example:
        >>> memorization_distances(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, -1.0]]))
        tensor([0.2000])
    """
    signed = bool((train < 0).any()) if signed is None else signed
    distances = nearest_cosine_distance(generated, train, norms=norms)
    if signed or (generated < 0).any():  # otherwise no cosine is negative, as with Inception's features
        distances = torch.minimum(distances, nearest_cosine_distance(-generated, train, norms=norms))
    return distances


def penalized(fid: Tensor, memorization: Tensor, *, threshold: float) -> Tensor:
    """Divide a Fréchet distance by the memorization distance, if that lies below the threshold.

    A copy of the whole training set makes both vanish. It gets infinity *(our choice: torchmetrics gives it 0, its best
    figure)*; and a Fréchet distance below 1e-8, which is rounding, counts as 1e-8 wherever there is a penalty.

    Args:
        fid: the Fréchet distance, 0-d.
        memorization: the mean memorization distance, 0-d.
        threshold: from which on there is no penalty.

    Returns:
        0-d tensor; 0 only where there is no penalty.

    Example:
        >>> penalized(torch.tensor(3.0), torch.tensor(0.05), threshold=0.1)
        tensor(60.)
        >>> penalized(torch.tensor(0.0), torch.tensor(0.0), threshold=0.1)
        tensor(inf)
    """
    punished = fid.clamp(min=_TINY) / (memorization + _EPSILON)
    copied = (fid <= _TINY) & (memorization <= _EPSILON)
    return torch.where(memorization < threshold, punished.masked_fill(copied, torch.inf), fid)


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no memorization distance can be held against.

    Args:
        threshold: from which on there is no penalty.

    Raises:
        ValueError: if it lies outside [0, 1].

    Example:
        >>> check_threshold(0.1)
    """
    check_number("threshold", threshold, "[0, 1]", "0.1 is the default; 0 takes the penalty away.")
