"""Similarity of generated images to their nearest training images, by a copy-detection network."""

from torch import Tensor

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.checks import check_features, check_number
from lightning_iet.functional.nearest_training_distance import distance_summary


def sscd_similarity(generated: Tensor, train: Tensor, *, threshold: float = 0.5) -> dict[str, Tensor]:
    r"""Summarise the largest dot product of every generated descriptor with a training descriptor.

    .. math:: s(\hat x) = \max_j \langle f(\hat x), f(x_j) \rangle, \qquad \lVert f \rVert = 1

    (Somepalli et al., *Diffusion Art or Digital Forgery?*, CVPR 2023, arXiv:2212.03860.)

    Args:
        generated: descriptors, shape ``(Q, D)``, floating point; scaled to length one, which SSCD's have anyway.
        train: descriptors, shape ``(N, D)``, likewise.
        threshold: the similarity above which an image counts as a copy.

    Returns:
        As :func:`similarity_summary`.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.checks.check_features` and :func:`check_threshold`.

    Example:
        >>> import torch
        >>> train = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> sscd_similarity(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), train, threshold=0.9)
        {'q0.95': tensor(0.9800), 'share': tensor(0.3333)}
    """
    check_features(generated=generated, train=train)
    return similarity_summary(1 - nearest_cosine_distance(unit_rows(generated), unit_rows(train)), threshold=threshold)


def similarity_summary(similarities: Tensor, *, threshold: float = 0.5) -> dict[str, Tensor]:
    """Return the 95th percentile of similarities, and the share above a threshold, strictly.

    Args:
        similarities: shape ``(Q,)``.
        threshold: the similarity above which an image counts as a copy.

    Returns:
        ``"q0.95"`` and ``"share"``, 0-d tensors, NaN if there are no similarities.

    Raises:
        ValueError: as :func:`check_threshold`.

    Example:
        >>> import torch
        >>> similarity_summary(torch.tensor([0.1, 0.5, 0.6]))
        {'q0.95': tensor(0.5900), 'share': tensor(0.3333)}
    """
    check_threshold(threshold)
    quantile = distance_summary(similarities, quantiles=(0.95,))["q0.95"]
    return {"q0.95": quantile, "share": (similarities > threshold).to(similarities.dtype).mean()}


def check_threshold(threshold: float) -> None:
    """Raise a ValueError for a threshold outside [-1, 1], the similarities that there are."""
    check_number("threshold", threshold, "[-1, 1]", "The published one is 0.5.")
