"""Samples: with their index, drawn by weight, and what is known of them: labels, names, fingerprints."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from lightning_iet.utilities.files import printable
from lightning_iet.utilities.fingerprints import sha256_of, tensor_bytes
from lightning_iet.utilities.random import isolated_rng, seed_rng

FINGERPRINTED = 32
"""Samples by which a data set is known again."""
_SHOWN = 5  # names in a message


class Skip(NamedTuple):
    """A sample that cannot be used."""

    name: str
    reason: str


def reason_of(error: Exception) -> str:
    """Return why an image could not be read, in one line.

    Example:
        >>> reason_of(ValueError("cut  off")), reason_of(KeyError())
        ('cut off', 'KeyError')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":  # its message names an object in memory
        return "not an image that Pillow knows"
    return printable(" ".join(str(error).split())) or type(error).__name__


def name_of(source: Dataset[Any], index: int) -> str:
    """Return a sample's name for messages: the source's ``name(index)`` if it has that, else its position.

    Example:
        >>> class Named(list):
        ...     name = "of the data set"  # no method
        >>> name_of(Named("ab"), 1)
        '1'
    """
    name = getattr(source, "name", None)
    return printable(name(index)) if callable(name) else str(index)


def listed(skipped: Sequence[Skip]) -> str:
    """Return the first few samples that cannot be used, for a message.

    Example:
        >>> listed([Skip("a.png", "the file is empty")] * 6)
        "'a.png' (the file is empty), ..., and 1 more"
    """
    shown = [f"'{name}' ({reason})" for name, reason in skipped[:_SHOWN]]
    return ", ".join(shown) + (f", and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else "")


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """Return the class labels of a data set, shape ``(n,)``, or None.

    Looks for ``targets`` or ``labels``, an integer or word for each sample, through subsets and concatenations.

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
            if isinstance(labels, list | tuple) and labels and isinstance(labels[0], str):
                labels = np.unique(labels, return_inverse=True)[1]
            try:
                labels = torch.as_tensor(labels)
            except (RuntimeError, TypeError, ValueError):  # no numbers: boxes, paths
                continue
            length = len(dataset) if hasattr(dataset, "__len__") else len(labels)
            if labels.shape == (length,) and not labels.is_floating_point():
                return labels
    return None


def fingerprint_of_shards(shards: Sequence[Tensor]) -> str:
    """Return a hash of a split: which sample is in which shard.

    Example:
        >>> import torch
        >>> a, b, c = torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0])
        >>> fingerprint_of_shards([a, b]) == fingerprint_of_shards([a, b]), fingerprint_of_shards([c, b])
        (True, '...')
    """
    return sha256_of(tensor_bytes(shard) + b"|" for shard in shards)[:12]


def fingerprint_of_samples(dataset: Dataset[Any]) -> str:
    """Return a hash of a data set's size and of some :data:`FINGERPRINTED` of its samples, evenly spaced.

    *(our choice)* Not all of them: a run over millions of images must not read them twice to start.

    Args:
        dataset: Map-style. Random augmentations are seeded, so that they do not show.
    """
    size = len(dataset)  # type: ignore[arg-type]

    def parts() -> Iterator[bytes]:
        yield str(size).encode()
        for index in range(0, size, max(size // FINGERPRINTED, 1)):
            seed_rng(index)
            yield from _bytes(dataset[index])

    with isolated_rng():
        return sha256_of(parts())[:12]


def _bytes(sample: Any) -> Iterator[bytes]:
    """The content of a sample, whatever its structure."""
    if isinstance(sample, Tensor):
        yield tensor_bytes(sample)
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


def image_and_condition(sample: Any) -> tuple[Any, Any]:
    """Return the first two entries of a sample; an image alone has the condition 0.

    Example:
        >>> image_and_condition(("image", "a caption", 7)), image_and_condition("image")
        (('image', 'a caption'), ('image', 0))
    """
    if not isinstance(sample, tuple | list):
        return sample, 0
    return sample[0], sample[1] if len(sample) > 1 else 0


class Samples(Dataset[tuple[Tensor, Any, int]]):
    """Some of a source's samples; yields ``(image, condition, index)`` with the position among them as index.

    Args:
        source: A map-style data set whose samples are images, or tuples that begin with image and condition.
        indices: Which of its samples, shape ``(n,)``.
        prepare: Makes a tensor of an image.
        labels: Class of every sample of the source, which is then its condition; ``None`` = the source's own.

    Raises:
        ValueError: When a sample is read whose image is damaged, naming it.

    Attributes:
        targets: Classes of these samples, by which shards are stratified; only with ``labels``.

    Example:
        >>> samples = Samples(["a", "b", "c"], torch.tensor([2, 0]), str.upper, labels=torch.tensor([7, 8, 9]))
        >>> samples[0], samples.targets
        (('C', 9, 0), tensor([9, 7]))
    """

    targets: Tensor

    def __init__(
        self, source: Dataset[Any], indices: Tensor, prepare: Callable[[Any], Any], *, labels: Tensor | None = None
    ) -> None:
        self.source = source
        self.indices = indices
        self.prepare = prepare
        self.labelled = labels is not None
        if labels is not None:
            self.targets = labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the source's name of a sample, such as its file."""
        return name_of(self.source, int(self.indices[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        position = int(self.indices[index])
        try:
            image, condition = image_and_condition(self.source[position])
            image = self.prepare(image)
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            raise ValueError(
                f"Image '{name_of(self.source, position)}' cannot be read ({reason_of(error)}). With `check: true`, "
                "all such images are found before training."
            ) from error
        return image, int(self.targets[index]) if self.labelled else condition, index


class Layer(Dataset[Any]):
    """A data set around another map-style one, whose length and other attributes, such as ``targets``, it has."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        # Not yet set while unpickling; and a batch that the inner data set reads itself would pass this layer by.
        if name in ("dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class RandomFlips(Layer):
    """Samples whose images are mirrored left to right with probability 1/2.

    It uses torch's global generator, which is seeded for each sample and epoch under shards, so that a resumed run, or
    one on other processes, sees the same flips.

    Args:
        dataset: Yields tuples that begin with an image.

    Example:
        >>> flips = RandomFlips([(torch.tensor([[[1, 2]]]), "a caption", 0)])
        >>> sorted({tuple(flips[0][0].flatten().tolist()) for _ in range(99)})
        [(1, 2), (2, 1)]
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        image, *rest = self.dataset[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image, *rest)


class WithIndex(Layer):
    """A data set whose samples carry their index, so that statistics of a sample survive shuffling and sharding.

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
        super().__init__(dataset)
        self.key = key

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise KeyError(
                    f"Argument `key` expected a name that no entry of a sample has, but got {self.key!r}. Use another."
                )
            return {**sample, self.key: index}
        return (*sample, index) if isinstance(sample, tuple | list) else (sample, index)


def read_index(batch: Any, where: int | str | None) -> Tensor | None:
    """Find the index of each sample in a batch, (B,), integers; None if there is none.

    Args:
        batch: What the training step gets.
        where: Key of a dict or position in a tuple; ``None`` = the entry ``"index"``, or the last tensor of integers.

    Example:
        >>> read_index((torch.rand(2, 3), torch.tensor([7, 7]), torch.tensor([4, 0])), None)
        tensor([4, 0])
        >>> read_index({"image": torch.rand(2, 3), "index": torch.tensor([4, 0])}, None)
        tensor([4, 0])
    """
    if isinstance(batch, Mapping):
        found = batch.get("index" if where is None else where)
    elif isinstance(batch, list | tuple) and isinstance(where, int):
        found = batch[where] if -len(batch) <= where < len(batch) else None
    elif isinstance(batch, list | tuple) and where is None:
        found = next((entry for entry in reversed(batch) if is_index(entry)), None)
    else:
        found = None
    return found if is_index(found) else None


def is_index(value: Any) -> bool:
    """Return whether an entry of a batch holds one integer for each sample, as an index does, and as labels do."""
    if not isinstance(value, Tensor) or value.ndim != 1:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


class DrawTable:
    """Which sample is read in the place of each one in an epoch; read by the workers of a loader.

    It lies in shared memory. The main process writes it between epochs only, when no worker reads.

    Attributes:
        sample: Shape ``(n,)``, int64; empty until a data set is known, and then each sample itself.
    """

    def __init__(self) -> None:
        self.sample = torch.zeros(0, dtype=torch.long)

    def allocate(self, num_samples: int) -> None:
        """Make room for the samples of a data set; a table of that size stays as it is."""
        if len(self.sample) != num_samples:
            self.sample = torch.arange(num_samples).share_memory_()

    def write(self, sample: Tensor) -> None:
        """Say what is read in an epoch; shape ``(n,)``."""
        self.sample.copy_(sample)

    def clear(self) -> None:
        """Let each sample be read in its own place."""
        torch.arange(len(self.sample), out=self.sample)


class DrawnByWeight(Layer):
    """A data set from which :class:`~lightning_iet.AntiGradientControl` draws samples by weight (``weigh="draws"``).

    Without it, each sample is drawn once an epoch. With it, an epoch has as many draws as before, in which samples that
    the model knows better than others come up less often, and the others more often. The sampler deals out places, and
    the table says which sample is read in the place of another, under shards always one of the same shard. So it should
    deal out each place once an epoch: one that favours some samples, or puts those of one size into a batch, does so
    for places, not for what is read there.

    Make it the outermost wrapper, around :class:`~lightning_iet.data.WithIndex`, and keep it where it can be found
    before training: as an attribute of the data module, or in the loader that is given to ``fit``. Data modules of this
    package need nothing.

    Args:
        dataset: Map-style; its samples carry their index.
        table: What the callback writes; ``None`` = its own.

    Example:
        >>> from lightning_iet.data import WithIndex
        >>> drawn = DrawnByWeight(WithIndex(["a", "b", "c"]))
        >>> drawn.table.write(torch.tensor([0, 0, 2]))
        >>> [drawn[place] for place in range(len(drawn))]
        [('a', 0), ('a', 0), ('c', 2)]
    """

    def __init__(self, dataset: Dataset[Any], table: DrawTable | None = None) -> None:
        super().__init__(dataset)
        self.table = DrawTable() if table is None else table
        self.table.allocate(len(dataset))  # type: ignore[arg-type]
        self.is_paused = False

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index if self.is_paused else int(self.table.sample[index])]


@dataclass(frozen=True)
class IgnoreFirstSigterm:
    """A ``worker_init_fn`` after which a worker ends at the second SIGTERM, not at the first.

    Batch systems send that signal to all processes of a job. The main ones finish their step, for which they may need a
    batch that is not read yet. Workers end with their loader, or at a second signal.

    Args:
        init: The user's own ``worker_init_fn``, called as well.
    """

    init: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Prepare a worker."""
        signal.signal(signal.SIGTERM, _end_at_the_next)
        if self.init is not None:
            self.init(worker)


def _end_at_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, lambda *_: os._exit(128 + number))
