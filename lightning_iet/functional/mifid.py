"""Memorization-informed Fréchet distance, in the direction that sees memorization."""

import torch
from torch import Tensor

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.checks import check_features, check_number


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance (with ``N - 1``) of features.

    Args:
        features: shape ``(N, D)``, floating point, ``N >= 2``.

    Returns:
        Shapes ``(D,)`` and ``(D, D)``, float64.

    Example:
        >>> moments(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        (tensor([1., 2.], dtype=torch.float64), tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64))
    """
    rows = features.double()
    return rows.mean(dim=0), rows.T.cov()


def moments_of_sums(count: Tensor, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`moments` from the number of rows, their sum ``(D,)`` and that of their outer products ``(D, D)``.

    The sums, float64, add up over batches and processes.
    """
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    r"""Return the squared Fréchet distance of two normal distributions, which "the FID" is.

    .. math:: \lVert \mu - \mu' \rVert^2 + \operatorname{tr}\big(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}\big)

    (Heusel et al., NeurIPS 2017, arXiv:1706.08500.) The trace of the root is that of
    :math:`(\Sigma^{1/2} \Sigma' \Sigma^{1/2})^{1/2}`, which is symmetric, so that its eigenvalues are real and
    exact even where there are fewer images than features. (torchmetrics takes those of :math:`\Sigma \Sigma'`: of 50
    images with 200 features the distance to themselves is then -1e-6, and a perfect copy cannot be told.)

    Args:
        first: mean ``(D,)`` and covariance ``(D, D)``, as :func:`moments` returns them.
        second: likewise.

    Returns:
        0-d tensor, at least 0, float64.

    Example:
        >>> wide, narrow = torch.eye(2).double() * 4, torch.eye(2).double()
        >>> frechet_distance((torch.zeros(2), wide), (torch.ones(2), narrow))
        tensor(4., dtype=torch.float64)
    """
    (mean, covariance), (other_mean, other_covariance) = first, second
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return distance.clamp(min=0)


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
        TypeError, ValueError: as :func:`~lightning_iet.functional.checks.check_features` and :func:`check_threshold`.
        ValueError: if a set has fewer than two images, and hence no covariance.

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
    """Divide a Fréchet distance by the mean memorization distance, both 0-d, if the latter lies below the threshold.

    A copy of the whole training set makes both vanish. It gets infinity *(our choice: torchmetrics gives it 0, the best
    value)*; and a Fréchet distance below 1e-8, which is rounding, counts as 1e-8 wherever there is a penalty.

    Example:
        >>> penalized(torch.tensor(3.0), torch.tensor(0.05), threshold=0.1)
        tensor(60.)
    """
    punished = fid.clamp(min=_TINY) / (memorization + _EPSILON)
    copied = (fid <= _TINY) & (memorization <= _EPSILON)
    return torch.where(memorization < threshold, punished.masked_fill(copied, torch.inf), fid)


def check_threshold(threshold: float) -> None:
    """Raise a ValueError for a threshold outside [0, 1], the memorization distances that there are."""
    check_number("threshold", threshold, "[0, 1]", "0.1 is the default; 0 takes the penalty away.")
