"""Samples that say which one they are."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset

__all__ = ["WithIndex"]


class WithIndex(Dataset[Any]):
    """A data set whose samples carry their index: what per-sample bookkeeping goes by, whatever shuffles and shards.

    A tuple or list becomes a tuple with the index behind its entries, a dict gets an entry, and anything else becomes
    ``(sample, index)``. Other attributes, such as ``targets``, are those of the data set.

    Args:
        dataset: Map-style.
        key: Name of the index in samples that are dicts.

    Raises:
        TypeError: If the data set is a stream, whose samples have no index to be found by.
        KeyError: When a sample is read that has an entry of that name.

    Example:
        >>> images, pairs, dicts = ["a", "b"], [("a", 7), ("b", 8)], [{"image": "a"}, {"image": "b"}]
        >>> [WithIndex(dataset)[1] for dataset in (images, pairs, dicts)]
        [('b', 1), ('b', 8, 1), {'image': 'b', 'index': 1}]
    """

    def __init__(self, dataset: Dataset[Any], *, key: str = "index") -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"Argument `dataset` expected a map-style data set, but got the stream {type(dataset).__name__}. "
                "Let the stream yield a number with each sample."
            )
        self.dataset = dataset
        self.key = key

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet set: while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise KeyError(
                    f"Argument `key` expected a name that no entry of a sample has, but got {self.key!r}. Use another."
                )
            return {**sample, self.key: index}
        return (*sample, index) if isinstance(sample, tuple | list) else (sample, index)
