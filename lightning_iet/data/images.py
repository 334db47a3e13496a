"""The base of image data modules: what is trained on, and two held-out sets to judge by."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.data.decoding import Channels, Fit, Preparation, Size
from lightning_iet.data.inspection import check_labels, check_sizes, inspect
from lightning_iet.data.loaders import Patient
from lightning_iet.data.samples import RandomFlips, Samples, Skip, labels_of, listed
from lightning_iet.data.splits import SetSizes, deal
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.seeding import derive_seed


class IndexedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images in memory; yields ``(image, label, index)``, the image float in [0, 1].

    Args:
        images: Float in [0, 1], or uint8, which takes a quarter of the memory; shape ``(n, C, H, W)``.
        labels: Classes, shape ``(n,)``.

    Raises:
        ValueError: If numbers disagree, or images are not in [0, 1].

    Example:
        >>> image, label, index = IndexedImages(torch.zeros(3, 1, 2, 2), torch.tensor([7, 8, 9]))[1]
        >>> image.shape, int(label), index
        (torch.Size([1, 2, 2]), 8, 1)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"Argument `images` expected shape (n, C, H, W) with one label each, but got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        checked = len(images) > 0 and images.dtype != torch.uint8
        if checked and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError("Argument `images` expected finite values in [0, 1], but got others. Divide 8-bit by 255.")
        self.images = images
        self.targets = labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return unit_interval(self.images[index]), self.targets[index], index

    def __len__(self) -> int:
        return len(self.images)


class SyntheticImages(Dataset[tuple[Tensor, Any]]):
    """Uniform noise; yields ``(image, condition)``, drawn when it is read.

    Args:
        num: Number of images.
        channels: Of each image.
        size: Height and width.
        num_classes: Classes in equal shares, as ``targets``; ``None`` = no labels.
        captioned: Whether images have captions instead.
        seed: Of all images.

    Example:
        >>> images = SyntheticImages(6, channels=3, size=(8, 4), num_classes=3)
        >>> images[1][0].shape, images.targets
        (torch.Size([3, 8, 4]), tensor([0, 1, 2, 0, 1, 2]))
        >>> SyntheticImages(6, channels=3, size=(8, 4), captioned=True)[1][1]
        'synthetic image 1'
    """

    targets: Tensor

    def __init__(
        self,
        num: int,
        *,
        channels: int,
        size: Size,
        num_classes: int | None = None,
        captioned: bool = False,
        seed: int = 0,
    ) -> None:
        self.num = num
        self.shape = (channels, *size)
        self.captioned = captioned
        self.seed = seed
        if num_classes is not None and not captioned:
            self.targets = torch.arange(num) % num_classes

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index))
        image = torch.rand(self.shape, generator=generator)
        return image, f"synthetic image {index}" if self.captioned else 0


log = logging.getLogger(__name__)

_IN_MEMORY = (IndexedImages, SyntheticImages)


@dataclass(frozen=True, eq=False)
class Pool:
    """What sets of samples are drawn from.

    Attributes:
        source: The map-style data set.
        indices: Its samples that can be used, shape ``(m,)``.
        labels: Class of every sample of the source, usable or not; ``None`` = it has none.
        skipped: The others.
        sizes: Of each size of image that was met, one name.
    """

    source: Dataset[Any]
    indices: Tensor
    labels: Tensor | None = None
    skipped: Sequence[Skip] = ()
    sizes: Mapping[Size, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(
        cls,
        source: Dataset[Any],
        prepare: Preparation,
        *,
        where: str,
        skip: bool = False,
        check: bool = True,
        num_classes: int | None = None,
    ) -> Self:
        """Look at a source.

        Args:
            source: Map-style; samples that it knows to be unusable, and leaves out, may be named as ``source.skipped``.
            prepare: Makes a tensor of an image.
            where: It lies, for messages.
            skip: Whether what cannot be used is left out, instead of ending the run.
            check: Whether to try every image, unless it is in memory.
            num_classes: Labels are below it.

        Raises:
            TypeError: If it is not map-style.
            ValueError: If some images cannot be used, or none, or labels are out of range.
        """
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise TypeError(
                f"Method `load` expected to return a map-style data set, or a tuple of two, but got "
                f"{type(source).__name__}. Give it `__getitem__` and `__len__`."
            )
        labels = labels_of(source)
        total = len(source)
        indices, skipped, sizes = torch.arange(total), list(getattr(source, "skipped", ())), dict[Size, str]()
        total += len(skipped)
        if check and not isinstance(source, _IN_MEMORY):
            indices, more, sizes = inspect(source, prepare)
            skipped += more
        if skipped and (not skip or not len(indices)):
            raise ValueError(
                f"Argument `root` expected images that can all be used, but got {where} with {len(skipped)} of {total} "
                f"that cannot: {listed(skipped)}. Mend or remove them, or leave them out with `on_error: skip`."
            )
        if not len(indices):
            raise ValueError(f"Argument `root` expected images, but got {where}, which holds none. Check the path.")
        if skipped:
            log.warning("Left out %d of %d images of %s: %s.", len(skipped), total, where, listed(skipped))
        if labels is not None:
            check_labels(source, labels, num_classes)
        return cls(source, indices, labels, skipped, sizes)

    def draw(self, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
        """Draw disjoint sets, each with the classes in the shares that they have of all.

        Args:
            sizes: Of the sets, together at most the number of usable samples.
            seed: Of the draw.

        Returns:
            Positions in the source, ascending: one tensor per set.
        """
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels[self.indices]
        order = deal(labels, seed=seed, proportional=True)[: sum(sizes)]
        return [self.indices[part.sort().values] for part in order.split(list(sizes))]


_FEW = 16  # synthetic images of each held-out set, and of each class


class ImageDataModule(pl.LightningDataModule):
    """Base of data modules that our evaluation understands; a subclass says in :meth:`load` where its images are.

    ``load`` returns a map-style data set whose samples are images, or begin with image and condition: a class
    (``int``) or a caption (``str``). Images are files' bytes, Pillow's, arrays, or tensors (uint8, or float in [0, 1]).
    With labels as ``targets``, all sets and shards have the classes in equal shares. Or it returns a tuple of two:
    one to train on, one to hold out. Splits, sizes, channels, flips, loaders and the synthetic twin are done here.

    Args:
        root: Where the data are.
        batch_size: Images in a batch.
        num_workers: Processes that read ahead and decode.
        image_size: Height and width to bring images to, or one number for both; ``None`` = they have one size.
        fit: How: ``"crop"`` takes the middle of an image scaled to cover the size, ``"stretch"`` changes proportions.
        channels: 1, 3, or 4 (with transparency).
        flip: Whether training images are mirrored left to right at random.
        subset: Number of training images; ``None`` = all that are not held out.
        num_control: Number of held-out images that stand in for generated ones; 0 = none.
        num_reference: Number of further held-out images, which FID compares with; ``None`` = all that are left (where
            there is one source and no ``subset``: as many as in the control).
        num_classes: Number of classes, for labels to be checked against; ``None`` = as many as there are.
        on_error: Images that cannot be used are named and counted: ``"raise"`` ends the run, ``"skip"`` leaves them
            out.
        check: Whether all images are read once before training, to find those; without it, the first one met ends the
            run.
        download: Whether data may be fetched from the network.
        synthetic: Whether random images take the place of the data, a few of them: nothing is read.
        seed: Seed of the split.

    Attributes:
        train_set: What the model is trained on, yielding ``(image in [0, 1], condition, index)``, never mirrored.
        control_set: Held-out images, put in the place of generated ones: what a figure looks like without memorization.
            ``None`` where there are none.
        reference_set: Further held-out images, which FID compares with; or ``None``.
        skipped: Images that were left out, with their reasons.

    Raises:
        ValueError: For arguments out of range; in ``setup``, for images, labels and numbers that do not fit.

    Example:
        >>> class Noise(ImageDataModule):
        ...     def load(self):
        ...         return IndexedImages(torch.rand(60, 3, 8, 8), torch.arange(60) % 2)
        >>> noise = Noise(num_control=10, batch_size=8, image_size=16)
        >>> noise.setup("fit")
        >>> [len(images) for images in (noise.train_set, noise.control_set, noise.reference_set)]
        [40, 10, 10]
        >>> images, labels, indices = next(iter(noise.train_dataloader()))
        >>> images.shape, labels.dtype
        (torch.Size([8, 3, 16, 16]), torch.int64)
    """

    title: ClassVar[str] = "the data"
    """What messages call the data."""
    downloadable: ClassVar[bool] = False
    native_size: ClassVar[Size] = (32, 32)
    """Size of the data's own images, and that of synthetic ones where no ``image_size`` is given."""
    captioned: bool = False
    """Whether conditions are captions; those of synthetic images are, too."""

    train_set: Dataset[Any]
    control_set: Dataset[Any] | None
    reference_set: Dataset[Any] | None

    def __init__(
        self,
        root: Path | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
        channels: Channels = 3,
        flip: bool = False,
        subset: int | None = None,
        num_control: int = 512,
        num_reference: int | None = None,
        num_classes: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        check: bool = True,
        download: bool = False,
        synthetic: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Argument `batch_size` expected an integer ≥ 1, but got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"Argument `num_workers` expected an integer ≥ 0, but got {num_workers}.")
        if download and not self.downloadable:
            raise ValueError(
                f"Argument `download` expected False, since {type(self).__name__} reads what is there, but got True. "
                "Give the data's place with `root`."
            )
        _check_choice("channels", channels, (1, 3, 4))
        _check_choice("fit", fit, ("crop", "stretch"))
        _check_choice("on_error", on_error, ("raise", "skip"))
        self.root = None if root is None else Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = _size(image_size)
        self.fit = fit
        self.channels = channels
        self.flip = flip
        self.set_sizes = SetSizes(subset, num_control, num_reference)
        self.num_classes = num_classes
        self.on_error = on_error
        self.check = check
        self.download = download
        self.synthetic = synthetic
        self.seed = seed
        self.skipped: list[Skip] = []

    # --- what a subclass says ----------------------------------------------------------------------------------------

    def load(self) -> Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]:
        """Where the images are: one source, or one to train on and one to hold out."""
        raise NotImplementedError(f"{type(self).__name__} has no method `load`, which returns its images.")

    def fetch(self) -> None:
        """Download the data; on one process, with ``download=True``."""

    # --- what follows from it ----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download the data, where that is asked for."""
        if self.download and not self.synthetic:
            self.fetch()

    def setup(self, stage: str) -> None:
        """Make the three sets, once."""
        if "train_set" in vars(self):
            return
        prepare = Preparation(self.channels, self.image_size, self.fit)
        sizes, loaded = self._synthetic() if self.synthetic else (self.set_sizes, self.load())
        sources = loaded if isinstance(loaded, tuple) else (loaded,)
        pools = [self._pool(source, prepare) for source in sources]
        self.skipped = [skip for pool in pools for skip in pool.skipped]
        if self.image_size is None:
            check_sizes({size: name for pool in reversed(pools) for size, name in pool.sizes.items()})
        if self.num_classes is None and pools[0].labels is not None:
            self.num_classes = int(pools[0].labels.max()) + 1
        train, *held_out = (
            Samples(pool.source, indices, prepare, labels=pool.labels) for pool, indices in self._split(pools, sizes)
        )
        self.control_set, self.reference_set = (samples if len(samples) else None for samples in held_out)
        self.train_set = train

    def _pool(self, source: Dataset[Any], prepare: Preparation) -> Pool:
        return Pool.of(
            source,
            prepare,
            where=self.title if self.root is None else f"'{self.root}'",
            skip=self.on_error == "skip",
            check=self.check,
            num_classes=self.num_classes,
        )

    def _split(self, pools: Sequence[Pool], sizes: SetSizes) -> list[tuple[Pool, Tensor]]:
        """The samples of each set, in the order in which they lie in their source."""
        if len(pools) == 1:
            parts = [(pools[0], sizes.of_one(len(pools[0])))]
        else:
            parts = list(zip(pools, sizes.of_two(*map(len, pools)), strict=True))
        return [(pool, drawn) for pool, numbers in parts for drawn in pool.draw(numbers, seed=self.seed)]

    def _synthetic(self) -> tuple[SetSizes, SyntheticImages]:
        most = max(4 * _FEW, _FEW * (self.num_classes or 1)), _FEW, _FEW
        numbers = [m if asked is None else min(m, asked) for m, asked in zip(most, self.set_sizes, strict=True)]
        images = SyntheticImages(
            sum(numbers),
            channels=self.channels,
            size=self.image_size or self.native_size,
            num_classes=self.num_classes,
            captioned=self.captioned,
            seed=self.seed,
        )
        return SetSizes(*numbers), images

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, shuffled."""
        return self._loader(RandomFlips(self.train_set) if self.flip else self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The control images; no loader where there are none."""
        return [] if self.control_set is None else self._loader(self.control_set, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The reference images; no loader where there are none."""
        return [] if self.reference_set is None else self._loader(self.reference_set, shuffle=False)

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=Patient(),
            pin_memory=torch.cuda.is_available(),
        )


def _size(image_size: int | tuple[int, int] | None) -> Size | None:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(
            f"Argument `image_size` expected a height and a width ≥ 1, or one number, but got {image_size}."
        )
    return None if size is None else (size[0], size[1])


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Argument `{name}` expected one of {', '.join(map(repr, choices))}, but got {value!r}.")
