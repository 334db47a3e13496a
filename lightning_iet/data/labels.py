"""Class labels of data sets."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

__all__ = ["labels_of"]


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """Class labels of a data set, shape ``(n,)``, or None.

    Looks for ``targets`` or ``labels``, through subsets and concatenations.

    Example:
        >>> labels_of(Subset([1, 2, 3], [0])) is None
        True
    """
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(cast("list[Tensor]", parts))
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if labels is not None:
            labels = torch.as_tensor(np.unique(labels, return_inverse=True)[1] if _are_words(labels) else labels)
            if labels.ndim == 1 and not labels.is_floating_point():
                return labels
    return None


def _are_words(labels: object) -> bool:
    return isinstance(labels, list | tuple) and bool(labels) and isinstance(labels[0], str)
