"""The base of image data modules: three sets, images checked before training, and errors of data that are not there."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.data.augmentation import Augmented, Magnitudes
from lightning_iet.data.decoding import Channels, Depth, Fit, Preparation, Size, within_unit_interval
from lightning_iet.data.duplicates import (
    Duplication,
    FirstOfGroups,
    OncePerGroup,
    Repeated,
    SomeSamples,
    images_of,
    repeat_images,
    write_groups,
)
from lightning_iet.data.formats import RANGES, Range, choose_ranges, format_range, parse_range
from lightning_iet.data.samples import (
    DrawnByWeight,
    DrawTable,
    IgnoreFirstSigterm,
    RandomFlips,
    Samples,
    Skip,
    image_and_condition,
    labels_of,
    listed,
    name_of,
    reason_of,
)
from lightning_iet.data.splits import SetSizes, deal
from lightning_iet.functional.checks import check_at_least, check_choice, unit_interval
from lightning_iet.functional.duplicates import Duplicates, duplicate_groups
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.files import run_folder
from lightning_iet.utilities.lightning import is_trial
from lightning_iet.utilities.text import counted

log = logging.getLogger(__name__)


class IndexedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images in memory; yields ``(image, label, index)``, the image float in [0, 1].

    Args:
        images: Float in [0, 1], or uint8, which takes a quarter of the memory; shape ``(n, C, H, W)``.
        labels: Classes, shape ``(n,)``; by default all 0.

    Raises:
        ValueError: If numbers disagree, or images are not in [0, 1].

    Example:
        >>> image, label, index = IndexedImages(torch.zeros(3, 1, 2, 2), torch.tensor([7, 8, 9]))[1]
        >>> image.shape, int(label), index
        (torch.Size([1, 2, 2]), 8, 1)
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"Argument `images` expected shape (n, C, H, W) with one label each, but got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        images = images if images.dtype == torch.uint8 else within_unit_interval(images)
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
    """Uniform noise; yields ``(image, condition)``.

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


# --- images are read once before training, so that what cannot be used is found at the start --------------------------

BATCH = 64
FEW = 1024  # images up to which starting processes takes longer than reading


class Deep(NamedTuple):
    """How many images of more than 8 bits there are of a depth, and their least and largest stored value."""

    depth: Depth
    images: int
    values: Range


@dataclass(frozen=True, eq=False)
class CheckedSource:
    """A source, and which of its samples can be used.

    Attributes:
        source: The map-style data set.
        indices: Its samples that can be used, shape ``(m,)``.
        labels: Class of every sample of the source, usable or not; ``None`` = it has none.
        skipped: The others.
        sizes: Of each size of image that was met, one name.
        deep: Images of more than 8 bits that were met.
    """

    source: Dataset[Any]
    indices: Tensor
    labels: Tensor | None = None
    skipped: Sequence[Skip] = ()
    sizes: Mapping[Size, str] = field(default_factory=dict)
    deep: Sequence["Deep"] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
        """Select disjoint sets of some sizes at random, each with the classes in the shares that they have of all.

        Returns:
            Positions in the source, ascending: one tensor per set.
        """
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels[self.indices]
        order = deal(labels, seed=seed, proportional=True)[: sum(sizes)]
        return [self.indices[part.sort().values] for part in order.split(list(sizes))]


def check_source(
    source: Dataset[Any],
    prepare: Callable[[Any], Tensor],
    *,
    where: str,
    skip: bool = False,
    read: bool = True,
    num_classes: int | None = None,
) -> CheckedSource:
    """Check the images and labels of a source.

    Args:
        source: Map-style; samples that it knows to be unusable, and leaves out, may be named as ``source.skipped``.
        prepare: Makes a tensor of an image.
        where: It lies, for messages.
        skip: Whether what cannot be used is left out, instead of ending the run.
        read: Whether to read every image.
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
    indices, skipped, sizes = torch.arange(len(source)), list(getattr(source, "skipped", ())), dict[Size, str]()
    deep: list[Deep] = []
    total = len(source) + len(skipped)
    if read:
        indices, unreadable, sizes, deep = inspect(source, prepare)
        skipped += unreadable
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
    return CheckedSource(source, indices, labels, skipped, sizes, deep)


class _Finding(NamedTuple):
    position: int
    size: Size
    reason: str | None
    depth: Depth = "8 bits"
    values: Range = (0, 0)


def inspect(
    source: Dataset[Any], prepare: Callable[[Any], Tensor], *, workers: int | None = None
) -> tuple[Tensor, list[Skip], dict[Size, str], list[Deep]]:
    """Read and prepare every image of a source.

    Args:
        source: Map-style, see :class:`~lightning_iet.data.samples.Samples`.
        prepare: Makes a tensor of an image.
        workers: Processes; ``None`` = one for each core, or none at all for few images.

    Returns:
        The samples that can be used, shape ``(m,)``; the others; of each size the first image's name; and what there
        is of more than 8 bits, if ``prepare`` is a :class:`~lightning_iet.data.decoding.Preparation`.

    Example:
        >>> source = [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)]
        >>> usable, skipped, sizes, _ = inspect(source, torch.Tensor.float)
        >>> usable, skipped[0].reason, sizes
        (tensor([0]), 'values from 2 to 2, not in [0, 1]', {(4, 4): '0'})
    """
    found = _Findings(source, prepare)
    loader = DataLoader(found, BATCH, num_workers=_workers(len(found)) if workers is None else workers, collate_fn=list)
    usable, skipped, sizes = list[int](), list[Skip](), dict[Size, str]()
    deep: dict[Depth, Deep] = {}
    for finding in (finding for batch in loader for finding in batch):
        if finding.reason is None:
            usable.append(finding.position)
            if finding.size not in sizes:
                sizes[finding.size] = name_of(source, finding.position)
            if finding.depth != "8 bits":
                _, images, (low, high) = deep.get(finding.depth, Deep(finding.depth, 0, finding.values))
                values = min(low, finding.values[0]), max(high, finding.values[1])
                deep[finding.depth] = Deep(finding.depth, images + 1, values)
        else:
            skipped.append(Skip(name_of(source, finding.position), finding.reason))
    return torch.tensor(usable, dtype=torch.long), skipped, sizes, list(deep.values())


class _Findings(Dataset[_Finding]):
    def __init__(self, source: Dataset[Any], prepare: Callable[[Any], Tensor]) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> _Finding:
        try:
            stored = image_and_condition(self.source[index])[0]
            depth: Depth = "8 bits"
            values: Range = (0, 0)
            if isinstance(self.prepare, Preparation):
                image, depth, values = self.prepare.measured(stored)
            else:
                image = self.prepare(stored)
            low, high = (value.item() for value in image.aminmax())
            if not (low >= 0 and high <= 1):  # written so that NaN, which compares false, is refused as well
                raise ValueError(f"values from {low:.4g} to {high:.4g}, not in [0, 1]")
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            return _Finding(index, (0, 0), reason_of(error))
        return _Finding(index, (image.shape[-2], image.shape[-1]), None, depth, values)


def _workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if images > FEW else 0


def check_sizes(sizes: Mapping[Size, str]) -> None:
    """Refuse images of several sizes, of each of which an image's name is given.

    Raises:
        ValueError: Naming two of them.
    """
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"Argument `image_size` expected the size to bring all images to, since '{first}' has {one[1]}x{one[0]} "
            f"pixels and '{second}' has {other[1]}x{other[0]}, but got None."
        )


def check_labels(source: Dataset[Any], labels: Tensor, num_classes: int | None) -> None:
    """Refuse labels, shape ``(n,)``, outside of ``0 … num_classes - 1``, or below 0 where that is None.

    Raises:
        ValueError: Naming the first sample.
    """
    wrong = (labels < 0) if num_classes is None else (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        wanted = "labels from 0" if num_classes is None else f"labels 0 … {num_classes - 1}"
        raise ValueError(
            f"Argument `num_classes` expected {wanted}, but got {int(labels[index])} for '{name_of(source, index)}' "
            f"({int(wrong.sum())} of {len(labels)} are out of range). Number the classes from 0, or correct the number."
        )


# --- the data module --------------------------------------------------------------------------------------------------


class ImageDataModule(pl.LightningDataModule):
    """Base of this package's image data modules; a subclass returns its images from :meth:`load`.

    ``load`` returns a map-style data set whose samples are images, or begin with image and condition: a class
    (``int``) or a caption (``str``). Images are files' bytes, Pillow's, arrays, or tensors (uint8, or float in [0, 1]).
    With labels as ``targets``, all sets and shards have the classes in equal shares. Or it returns a tuple of two:
    one to train on, one to hold out. Splits, sizes, channels, flips, loaders and synthetic images are done here.

    Args:
        root: Where the data are.
        batch_size: Images in a batch.
        num_workers: Processes that read ahead and decode.
        image_size: Height and width to bring images to, or one number for both; ``None`` = they have one size.
        fit: How: ``"crop"`` takes the middle of an image scaled to cover the size, ``"stretch"`` changes proportions.
        channels: 1, 3, or 4 (with transparency).
        range: Values of black and white in images of more than 8 bits: ``"auto"`` = 0 and the least of 8, 10, 12, 14
            and 16 bits that holds all integers, 0 and 1 for floating point; ``"full"`` = 0 and 65535 for integers; or
            ``"LOW:HIGH"``, such as ``"0:4095"`` or ``"-1024:3071"``. What was found and done is said in one line.
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
        duplicates: What becomes of near-duplicates among the training images, found by pixels as the audit finds them:
            ``"keep"``; ``"drop"`` trains on one image of each group; ``"balance"`` draws each group as often as one
            image, by one of its members at random. Groups are listed in ``duplicates.csv`` of the run folder. With
            ``"drop"`` and ``"balance"``, held-out images that are near-duplicates of training images are left out.
        repeated_images: A stress test: so many training images occur ``repeats`` times, slightly changed
            (with captions: in exact copies). 0 = none.
        repeats: How often each of them occurs.

    Attributes:
        train_set: What the model is trained on, yielding ``(image in [0, 1], condition, index)``, never mirrored.
        control_set: Held-out images, measured in the place of generated ones: the value of a measure without
            memorization. ``None`` where there are none.
        reference_set: Further held-out images, which FID compares with; or ``None``.
        skipped: Images that were left out, with their reasons.
        duplicate_groups: Near-duplicates among the training images; ``None`` where they were not looked for.
        num_look_alikes: Number of images that were held out and left out, as near-duplicates of training images.

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
    """Name of the data in messages."""
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
        range: str = "auto",
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
        duplicates: Duplication = "keep",
        repeated_images: int = 0,
        repeats: int = 20,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        if download and not self.downloadable:
            raise ValueError(
                f"Argument `download` expected False, since {type(self).__name__} reads what is there, but got True. "
                "Give the data's place with `root`."
            )
        check_choice("channels", channels, (1, 3, 4))
        check_choice("fit", fit, ("crop", "stretch"))
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("duplicates", duplicates, get_args(Duplication))
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"Argument `image_size` expected a height and a width ≥ 1, or one number, but got {image_size}."
            )
        self.root = None if root is None else Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = None if size is None else (size[0], size[1])
        self.fit = fit
        self.channels = channels
        self.value_range = parse_range(range)
        self.flip = flip
        self.set_sizes = SetSizes(subset, num_control, num_reference)
        self.num_classes = num_classes
        self.on_error = on_error
        self.check = check
        self.download = download
        self.synthetic = synthetic
        self.seed = seed
        self.duplicates = duplicates
        self.repeated_images = repeated_images
        self.repeats = repeats
        self.skipped: list[Skip] = []
        self.duplicate_groups: Duplicates | None = None
        self.num_look_alikes = 0
        self._names_to_list: list[str] | None = None  # of training images, until their groups are written
        self.magnitudes: Magnitudes | None = None  # of an augmentation that is at work
        self.draws: DrawTable | None = None  # of anti-gradient control that draws by weight

    # --- to be defined by subclasses ---------------------------------------------------------------------------------

    def load(self) -> Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]:
        """Return the images: one source, or one to train on and one to hold out."""
        raise NotImplementedError(f"{type(self).__name__} has no method `load`, which returns its images.")

    def fetch(self) -> None:
        """Download the data; on one process, with ``download=True``."""

    # --- sets and loaders --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download the data, where that is asked for."""
        if self.download and not self.synthetic:
            self.fetch()

    def setup(self, stage: str) -> None:
        """Make the three sets, once; a run that trains lists near-duplicates, also where they were made before it."""
        if "train_set" in vars(self):
            self._list_groups()
            return
        prepare = Preparation(self.channels, self.image_size, self.fit, self.value_range)
        sizes, loaded = self._synthetic() if self.synthetic else (self.set_sizes, self.load())
        parts = loaded if isinstance(loaded, tuple) else (loaded,)
        sources = [self._checked_source(part, prepare) for part in parts]
        self.skipped = [skip for source in sources for skip in source.skipped]
        prepare = self._ranged(prepare, sources)
        if self.image_size is None:
            check_sizes({size: name for source in reversed(sources) for size, name in source.sizes.items()})
        if self.num_classes is None and sources[0].labels is not None:
            self.num_classes = int(sources[0].labels.max()) + 1
        numbers = [sizes.of_one(len(sources[0]))] if len(sources) == 1 else sizes.of_two(*map(len, sources))
        train, *held_out = (
            Samples(source.source, indices, prepare, labels=source.labels)
            for source, of_source in zip(sources, numbers, strict=True)
            for indices in source.select(of_source, seed=self.seed)
        )
        self.control_set, self.reference_set = (samples if len(samples) else None for samples in held_out)
        self.train_set = self.arrange(train)

    def arrange(self, train: Dataset[Any]) -> Dataset[Any]:
        """Repeat some training images, then drop or balance near-duplicates, as the options say.

        Near-duplicates of training images leave ``control_set`` and ``reference_set``, which have to be there.

        Args:
            train: Yields ``(image, condition, index)``.

        Raises:
            ValueError: If more images are to be repeated than there are; if all training images are near-duplicates of
                one another, or all of a held-out set are of training images.
        """
        if self.repeated_images:
            labels = labels_of(train)
            if labels is None and isinstance(train[0][1], str):  # of captions images are repeated as they are
                train = Repeated(train, repeated=self.repeated_images, repeats=self.repeats)
            else:
                images = images_of(train)
                labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
                order = deal(labels, seed=self.seed)  # the classes in turn
                images, source = repeat_images(
                    images[order], repeated=self.repeated_images, repeats=self.repeats, seed=self.seed
                )
                train = IndexedImages(images, labels[order][source])
        if self.duplicates == "keep":
            return train
        images = images_of(train)
        found = self.duplicate_groups = duplicate_groups(images)
        if found.largest == len(images) > 1:
            raise ValueError(
                f"Argument `duplicates` expected different images to train on, but all {len(images)} are "
                "near-duplicates of one another. Add others, or keep them with --data.duplicates keep."
            )
        held_out = self._leave_out_look_alikes(images)
        self._names_to_list = [name_of(train, index) for index in range(len(images))]
        rank_zero_info(_told(found, self.duplicates, left_out=self.num_look_alikes, held_out=held_out))
        self._list_groups()
        return OncePerGroup(train, found.group) if self.duplicates == "balance" else FirstOfGroups(train, found.group)

    def _leave_out_look_alikes(self, train: Tensor) -> int:
        """Leave near-duplicates of training images out of the held-out sets; return how many images these had.

        They are looked for among all images at once. Held-out images that are near-duplicates of one another stay.
        """
        sets = {name: getattr(self, name) for name in ("control_set", "reference_set")}
        sets = {name: samples for name, samples in sets.items() if samples is not None}
        if not sets:
            return 0
        parts = [unit_interval(images) for images in (train, *map(images_of, sets.values()))]
        group = duplicate_groups(torch.cat(parts)).group.split([len(part) for part in parts])
        trained_on, self.num_look_alikes = group[0].unique(), 0
        for (name, samples), of_set in zip(sets.items(), group[1:], strict=True):
            places = (~torch.isin(of_set, trained_on)).nonzero()[:, 0]
            if not len(places):
                raise ValueError(
                    "Argument `duplicates` expected held-out images that differ from those to train on, but all "
                    f"{len(of_set)} of `{name}` are near-duplicates of training images. Hold out more, or keep them "
                    "with --data.duplicates keep."
                )
            if len(places) < len(of_set):
                self.num_look_alikes += len(of_set) - len(places)
                setattr(self, name, SomeSamples(samples, places))
        return sum(map(len, group[1:]))

    def _list_groups(self) -> None:
        """List near-duplicates in the run folder, if a run trains and has not listed them yet."""
        trainer, names, found = self.trainer, self._names_to_list, self.duplicate_groups
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or names is None or found is None:
            return
        self._names_to_list = None
        if trainer.is_global_zero and not is_trial(trainer):
            write_groups(found, names, run_folder(trainer) / "duplicates.csv")

    def _checked_source(self, source: Dataset[Any], prepare: Preparation) -> CheckedSource:
        return check_source(
            source,
            prepare,
            where=self.title if self.root is None else f"'{self.root}'",
            skip=self.on_error == "skip",
            read=self.check and not isinstance(source, IndexedImages | SyntheticImages),
            num_classes=self.num_classes,
        )

    def _ranged(self, prepare: Preparation, sources: Sequence[CheckedSource]) -> Preparation:
        """Find out what is black and white in images of more than 8 bits, and say so."""
        deep = [found for source in sources for found in source.deep]
        integers = [found for found in deep if found.depth == "integers"]
        if self.value_range == "auto" and 0 < len(integers) < len(deep):
            raise ValueError(
                f"Argument `range` expected 'full' or values such as 0:4095 for {self.title}, since images of "
                "integers and of floating point with more than 8 bits lie side by side, but got 'auto', which is one "
                "range for all. With 'full' white is 65535 and 1."
            )
        if self.value_range == "auto" and integers:
            values = min(found.values[0] for found in integers), max(found.values[1] for found in integers)
            self.value_range = choose_ranges({"all": values})["all"]
        for found in deep:
            low, high = RANGES[found.depth] if isinstance(self.value_range, str) else self.value_range
            log.warning(
                "%d images of %s hold %s of more than 8 bits, from %g to %g: %g becomes black and %g white. `range` "
                "says otherwise.",
                found.images,
                self.title if self.root is None else f"'{self.root}'",
                "integers" if found.depth == "integers" else "floating point",
                *found.values,
                low,
                high,
            )
        return replace(prepare, value_range=self.value_range)

    def _synthetic(self) -> tuple[SetSizes, SyntheticImages]:
        few = 16  # images of each held-out set, and of each class
        most = max(4 * few, few * (self.num_classes or 1)), few, few
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

    def state_dict(self) -> dict[str, Any]:
        """Return how images were prepared, so that an audit of the model prepares them in the same way."""
        how = {"image_size": self.image_size, "fit": self.fit, "channels": self.channels}
        return how | {"range": format_range(self.value_range)}

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, shuffled."""
        images: Dataset[Any] = self.train_set
        if self.magnitudes is not None:
            images = Augmented(images, self.magnitudes)
        images = RandomFlips(images) if self.flip else images
        return self._loader(images if self.draws is None else DrawnByWeight(images, self.draws), shuffle=True)

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
            worker_init_fn=IgnoreFirstSigterm(),
            pin_memory=torch.cuda.is_available(),
        )


def _told(found: Duplicates, how: Duplication, *, left_out: int, held_out: int) -> str:
    """Say what was found of near-duplicates, and what becomes of them.

    Example:
        >>> found = duplicate_groups(torch.tensor([0.0, 0.0, 0.5, 0.9])[:, None])
        >>> print(_told(found, "drop", left_out=1, held_out=8))
        2 of 4 training images lie in 1 group of near-duplicates: one of each is trained on. 1 of 8 held-out images ...
    """
    fate = "one of each is trained on" if how == "drop" else "each group is drawn as often as one image"
    groups = f"{counted(len(found.members), 'group')} of near-duplicates: {fate}"
    said = f"{found.images:,} of {len(found.group):,} training images lie in {groups}."
    if not found.members:
        said = f"None of {len(found.group):,} training images are near-duplicates of one another."
    if left_out:
        said += f" {left_out:,} of {held_out:,} held-out images are near-duplicates of training images, and left out."
    return said


def absent(title: str, expected: str, root: Path | None) -> FileNotFoundError:
    """Return the error for data that are not there.

    Example:
        >>> print(absent("CIFAR-10", "the folder cifar-10-batches-py", Path("data")))
        Argument `root` expected a folder with CIFAR-10 (the folder cifar-10-batches-py), but got 'data', which has ...
    """
    return FileNotFoundError(
        f"Argument `root` expected a folder with {title} ({expected}), but got '{root}', which has none. Give the "
        "folder that has, fetch the data by `download: true`, or try with random images by `synthetic: true`."
    )


def damaged(title: str, folder: Path) -> ValueError:
    """Return the error for files that are incomplete or changed."""
    return ValueError(
        f"Argument `root` expected the files of {title}, but some in '{folder}' are missing or damaged. Remove the "
        "folder and fetch the data again, by `download: true`."
    )


@contextmanager
def one_line_download(title: str, place: Path | None) -> Iterator[None]:
    """Raise a failed download as one line that says what to do without a network.

    Args:
        title: What is fetched.
        place: Where to; ``None`` = the client's own place.

    Raises:
        ConnectionError: Instead of what the download raises.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        into = "" if place is None else f"put it into '{place}' yourself, or "
        raise ConnectionError(
            f"{title} could not be fetched ({' '.join(str(error).split())[:200]}). Without a network, {into}give the "
            "path of a local copy as `root`."
        ) from error
