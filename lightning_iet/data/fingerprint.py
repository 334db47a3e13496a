"""Whether two data sets are the same, without reading all of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.utilities.random import isolated_rng

__all__ = ["fingerprint_of_samples", "fingerprint_of_shards"]


def fingerprint_of_shards(shards: Sequence[Tensor]) -> str:
    """Hash of a split: which sample is in which shard.

    Example:
        >>> import torch
        >>> a, b, c = torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0])
        >>> fingerprint_of_shards([a, b]) == fingerprint_of_shards([a, b]), fingerprint_of_shards([c, b])
        (True, '...')
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.numpy().tobytes() + b"|")
    return digest.hexdigest()[:12]


def fingerprint_of_samples(dataset: Dataset[Any], *, most: int = 32) -> str:
    """Hash of a data set's size and of a few of its samples, evenly spaced.

    *(our choice)* Not all of them: a run over millions of images must not read them twice to start.

    Args:
        dataset: Map-style. Random augmentations are seeded, so that they do not show.
        most: Number of samples to read.
    """
    size = len(dataset)  # type: ignore[arg-type]
    digest = hashlib.sha256(str(size).encode())
    for index in range(0, size, max(size // most, 1)):
        with isolated_rng(seed=index):
            for part in _bytes(dataset[index]):
                digest.update(part)
    return digest.hexdigest()[:12]


def _bytes(sample: Any) -> Iterator[bytes]:
    """The content of a sample, whatever its structure."""
    if isinstance(sample, Tensor):
        yield sample.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()  # bfloat16 too
    elif isinstance(sample, Mapping):
        for key in sorted(sample):
            yield from _bytes(sample[key])
    elif isinstance(sample, Sequence) and not isinstance(sample, str | bytes):
        for part in sample:
            yield from _bytes(part)
    elif hasattr(sample, "tobytes"):  # NumPy arrays, PIL images
        yield sample.tobytes()
    elif getattr(type(sample), "__repr__", None) is object.__repr__ and hasattr(sample, "__dict__"):  # shows an address
        yield from _bytes(vars(sample))
    else:
        yield repr(sample).encode()
