"""Samples that are augmented by RandAugment, each with a magnitude of its own."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandAugment

from lightning_iet.data.duplicates import OncePerGroup
from lightning_iet.data.samples import DrawnByWeight, Layer
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import isolated_rng, seed_rng

Operation: TypeAlias = Literal[
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip
"""The operations of RandAugment."""
Kind = TypeVar("Kind")

_OPERATIONS: tuple[str, ...] = get_args(Operation)
_REMEDY = "Augment images before they are normalized."
_ANY_CHANNELS = _OPERATIONS[:6]
AUGMENTATION_SEED = 2  # tells these seeds from those of other draws of a sample


def augment(
    image: Tensor, magnitude: int, *, seed: int, num_ops: int = 2, ops: Sequence[Operation] | None = None
) -> Tensor:
    """Augment an image by torchvision's RandAugment, as a function of the seed alone.

    Args:
        image: Shape ``(C, H, W)``, uint8, or floating point in [0, 1], which is rounded to 8 bits.
        magnitude: In 0 … 30; 0 returns the image as it is *(our choice: RandAugment would still change some images)*.
        seed: Of the operations; the global random generators are left alone.
        num_ops: Number of operations, one after the other.
        ops: Names of those that may be drawn; ``None`` = all 14, of which those that change colours need 1 or 3
            channels.

    Returns:
        The image, in the shape and type of ``image``.

    Raises:
        ValueError: If the image is not one, its values are out of range, or its channels do not suit the operations.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 4, 4) / 15
        >>> torch.equal(augment(image, 0, seed=0), image)
        True
        >>> augment(image, 10, seed=1, ops=["TranslateX"])[0, 0]
        tensor([0.0000, 0.0667, 0.1333, 0.2000])
    """
    if magnitude == 0:
        return image
    check_range(image, _REMEDY)
    return _augment(image, magnitude, seed=seed, num_ops=num_ops, ops=ops)


def _augment(image: Tensor, magnitude: int, *, seed: int, num_ops: int, ops: Sequence[Operation] | None) -> Tensor:
    """Augment an image whose range is checked, by a magnitude above 0."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8) if image.is_floating_point() else image
    names = _OPERATIONS if ops is None else ops
    check_channels(len(image), ops)
    with isolated_rng():
        seed_rng(seed, devices=False)
        pixels = _RestrictedRandAugment(num_ops, magnitude, names)(pixels)
    return pixels.to(image.dtype) / 255 if image.is_floating_point() else pixels


def check_range(images: Tensor, remedy: str) -> None:
    """Refuse images, uint8 or floating point, that cannot be augmented, with a remedy; waits for the device.

    Raises:
        ValueError: If they are floating point and not in [0, 1].
    """
    if not images.is_floating_point():
        return
    low, high = torch.stack(images.aminmax()).tolist()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(
            f"Argument `image` expected values in [0, 1], or 8 bits, to be augmented, but got [{low:g}, {high:g}]."
            f" {remedy}"
        )


def augment_rows(
    images: Tensor,
    magnitudes: Sequence[int],
    *,
    seeds: Sequence[int],
    num_ops: int = 2,
    ops: Sequence[Operation] | None = None,
) -> Tensor:
    """Augment each image of a batch, ``(B, C, H, W)``, see :func:`augment`: B magnitudes, 0 … 30, and B seeds.

    Returns a copy on the device of the images, or these themselves if no magnitude is above 0.

    Example:
        >>> images = torch.arange(8.0).reshape(2, 1, 2, 2) / 7
        >>> (augment_rows(images, [0, 30], seeds=[0, 0], ops=["TranslateX"]) == images).all((1, 2, 3))
        tensor([ True, False])
    """
    if not any(magnitudes):
        return images
    # All at once: to check them one by one would wait for the device as often.
    check_range(torch.stack([image for image, number in zip(images, magnitudes, strict=True) if number]), _REMEDY)
    options: dict[str, Any] = {"num_ops": num_ops, "ops": ops}
    rows = zip(images, magnitudes, seeds, strict=True)
    return torch.stack(
        [_augment(image, number, seed=seed, **options) if number else image for image, number, seed in rows]
    )


class _RestrictedRandAugment(RandAugment):
    """RandAugment with some of its operations."""

    def __init__(self, num_ops: int, magnitude: int, names: Sequence[str]) -> None:
        super().__init__(num_ops, magnitude, num_magnitude_bins=31)
        self.names = names

    def _augmentation_space(self, *args: Any) -> dict[str, tuple[Tensor, bool]]:
        space = super()._augmentation_space(*args)
        return {name: space[name] for name in self.names}


class Magnitudes:
    """How strongly each sample is augmented in an epoch; read by the workers of a loader.

    Its tensors lie in shared memory. The main process writes them between epochs only, when no worker reads.

    Args:
        num_ops: Number of operations.
        ops: Names of those that may be drawn; ``None`` = all.

    Attributes:
        by_sample: Magnitude of each sample, shape ``(n,)``, uint8; empty until a data set is known.
        clock: Seed of the run, and the epoch; int64.
    """

    def __init__(self, num_ops: int = 2, ops: Sequence[Operation] | None = None) -> None:
        check_operations(ops)
        self.num_ops = num_ops
        self.ops = None if ops is None else list(ops)
        self.by_sample = torch.zeros(0, dtype=torch.uint8)
        self.clock = torch.zeros(2, dtype=torch.long).share_memory_()

    def allocate(self, num_samples: int) -> None:
        """Make room for the samples of a data set; those that are there already stay."""
        if len(self.by_sample) != num_samples:
            self.by_sample = torch.zeros(num_samples, dtype=torch.uint8).share_memory_()

    def write(self, magnitudes: Tensor, *, seed: int, epoch: int) -> None:
        """Say how the samples are augmented in an epoch; magnitudes of shape ``(n,)``."""
        self.by_sample.copy_(magnitudes)
        self.clock.copy_(torch.tensor([seed, epoch]))


class Augmented(Layer):
    """A data set whose samples :class:`~lightning_iet.callbacks.ThresholdAwareAugmentation` augments.

    Without that callback it yields the samples as they are. The image is the first tensor of shape ``(C, H, W)`` in a
    sample; it must be uint8, or floating point in [0, 1]. Which samples are augmented, and how, depends on (seed,
    epoch, index) alone: not on the worker that reads them, nor on the process.

    Put it between what decodes and resizes images and what flips or normalizes them, and keep it where it can be found
    before training: as an attribute of the data module, or in the loader that is given to ``fit``. Its index is that of
    the batch, from :class:`~lightning_iet.data.WithIndex` inside or outside of it.

    Args:
        dataset: Map-style.
        magnitudes: What the callback writes; ``None`` = its own.

    Example:
        >>> augmented = Augmented([(torch.rand(1, 8, 8), 7)])
        >>> augmented[0][1], len(augmented)
        (7, 1)
    """

    def __init__(self, dataset: Dataset[Any], magnitudes: Magnitudes | None = None) -> None:
        super().__init__(dataset)
        self.magnitudes = Magnitudes() if magnitudes is None else magnitudes
        self.magnitudes.allocate(len(dataset))  # type: ignore[arg-type]
        self.is_paused = False

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        magnitude = 0 if self.is_paused else int(self.magnitudes.by_sample[index])
        if magnitude == 0:
            return sample
        seed, epoch = self.magnitudes.clock.tolist()
        settings = {"num_ops": self.magnitudes.num_ops, "ops": self.magnitudes.ops}
        return _with_image(sample, magnitude, seed=derive_seed(seed, epoch, index, AUGMENTATION_SEED), **settings)


def _with_image(sample: Any, magnitude: int, **settings: Any) -> Any:
    """The sample with its first image augmented."""
    if isinstance(sample, Tensor) and sample.ndim == 3:
        return augment(sample, magnitude, **settings)
    entries = dict(sample) if isinstance(sample, Mapping) else dict(enumerate(sample))
    place = next((key for key, value in entries.items() if isinstance(value, Tensor) and value.ndim == 3), None)
    if place is None:
        raise ValueError(
            "Augmented expected samples with an image, a tensor of shape (C, H, W), but got"
            f" {', '.join(type(value).__name__ for value in entries.values())}. Convert images to tensors inside of it."
        )
    entries[place] = augment(entries[place], magnitude, **settings)
    return entries if isinstance(sample, Mapping) else type(sample)(entries.values())


def image_entry(batch: Any, size: int) -> tuple[Any, Tensor]:
    """Find the images in a batch: the first tensor of shape ``(size, C, H, W)``, and its key or position.

    Raises:
        ValueError: If there is none.

    Example:
        >>> image_entry({"index": torch.arange(2), "image": torch.zeros(2, 1, 4, 4)}, 2)[0]
        'image'
    """
    entries = batch if isinstance(batch, Mapping) else dict(enumerate(batch))
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.ndim == 4 and len(value) == size:
            return key, value
    found = ", ".join(str(tuple(value.shape)) for value in entries.values() if isinstance(value, Tensor))
    raise ValueError(
        f"A batch of {size} samples expected images, a tensor of shape ({size}, C, H, W), but has tensors of shape"
        f" {found}. Let the loader return them."
    )


def put_entry(batch: Any, key: Any, value: Tensor) -> Callable[[], None]:
    """Put other images into a batch, in place; in a tuple, which cannot change, its tensor gets other memory.

    The memory that the images had is not written to: it may belong to a training set that is read again.

    Returns:
        A function that puts back what was there.

    Example:
        >>> memory = torch.zeros(4)
        >>> batch = (memory[:2], "a caption")
        >>> put_back = put_entry(batch, 0, torch.ones(2))
        >>> batch[0], memory
        (tensor([1., 1.]), tensor([0., 0., 0., 0.]))
        >>> put_back()
        >>> batch[0]
        tensor([0., 0.])
    """
    before = batch[key]
    if isinstance(batch, MutableMapping | MutableSequence):
        batch[key] = value
        return partial(batch.__setitem__, key, before)
    memory = before.data
    before.data = value
    return partial(setattr, before, "data", memory)


def check_operations(ops: Sequence[str] | None) -> None:
    """Refuse names that RandAugment has no operation for.

    Raises:
        ValueError: If there is such a name, or none at all.
    """
    if ops is not None and (not ops or not set(ops) <= set(_OPERATIONS)):
        found = ", ".join(map(repr, ops)) or "none"
        raise ValueError(f"Argument `ops` expected some of {', '.join(_OPERATIONS)}, but got {found}.")


def check_channels(channels: int, ops: Sequence[str] | None) -> None:
    """Refuse operations that do not suit images of a number of channels; ``None`` = all of them.

    Raises:
        ValueError: If one of them changes colours, and there are neither 1 nor 3 channels.
    """
    if channels not in (1, 3) and not set(_OPERATIONS if ops is None else ops) <= set(_ANY_CHANNELS):
        raise ValueError(
            f"Argument `ops` expected operations that suit images of {channels} channels, but got"
            f" {'all' if ops is None else ', '.join(ops)}. Use some of {', '.join(_ANY_CHANNELS)}."
        )


def layers(dataset: Any) -> Iterator[Any]:
    """A data set and those that it wraps, outermost first; of a loader, those of its data set.

    Example:
        >>> [type(layer).__name__ for layer in layers(DataLoader(Augmented([1, 2])))]
        ['Augmented', 'list']
    """
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    while dataset is not None:
        yield dataset
        inside = vars(dataset) if hasattr(dataset, "__dict__") else {}
        dataset = next((inside[name] for name in ("samples", "dataset", "stream") if name in inside), None)


def as_it_is(dataset: Any) -> Any:
    """The data set below the outermost layers that change what a loader reads: draws by weight, and augmentation.

    Example:
        >>> as_it_is(DrawnByWeight(Augmented([1, 2])))
        [1, 2]
    """
    while isinstance(dataset, Augmented | DrawnByWeight):
        dataset = dataset.dataset
    return dataset


def every_image(dataset: Any) -> Any:
    """The data set of all images that a run trains on: :func:`as_it_is`, with all members of groups that count as one.

    Example:
        >>> from lightning_iet.data.duplicates import OncePerGroup
        >>> len(every_image(Augmented(OncePerGroup([("dog", 0, 0), ("same dog", 0, 1)], torch.tensor([0, 0])))))
        2
    """
    dataset = as_it_is(dataset)
    return dataset.samples if isinstance(dataset, OncePerGroup) else dataset


@contextmanager
def unaugmented(dataset: Any) -> Iterator[None]:
    """Read samples in this process without augmentation, and each in its own place."""
    found = [layer for layer in layers(dataset) if isinstance(layer, Augmented | DrawnByWeight)]
    for layer in found:
        layer.is_paused = True
    try:
        yield
    finally:
        for layer in found:
            layer.is_paused = False


def find_layer(kind: type[Kind], *places: Any) -> Kind | None:
    """Find a data set of that class in loaders, data sets and data modules; None if there is none."""
    for place in places:
        if isinstance(place, DataLoader | Dataset):
            candidates = [place]
        else:
            inner = getattr(place, "__dict__", {})
            candidates = [value for value in inner.values() if isinstance(value, DataLoader | Dataset)]
        for candidate in candidates:
            for layer in layers(candidate):
                if isinstance(layer, kind):
                    return layer
    return None
