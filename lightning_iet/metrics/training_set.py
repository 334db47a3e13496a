"""What the memorization metrics share: a training set, given once, that generated images are compared with."""

from collections.abc import Callable, Iterable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_iet.functional.images import image_rows, unit_interval
from lightning_iet.functional.neighbors import search_rows, squared_norms
from lightning_iet.metrics.base import BaseMetric
from lightning_iet.metrics.features import embed_images

__all__ = ["TrainingSet", "TrainingSetMetric", "collect_images"]

_FLOATS = 2**28

TrainingSet = Tensor | Dataset[Any] | DataLoader[Any]


def collect_images(train: TrainingSet) -> Tensor:
    """Return all images of a training set as one tensor.

    Args:
        train: a tensor, shape ``(N, C, H, W)``; or a map-style data set that yields images, shape ``(C, H, W)``, or
            tuples whose first element is the image; or a data loader over one. Random augmentation does not belong
            here: it would hide the originals.

    Returns:
        Shape ``(N, C, H, W)``, in the data set's own dtype.

    Raises:
        TypeError: if ``train`` is of another kind, or yields something other than tensors.
        ValueError: if the set is empty, the images differ in size, or a data loader leaves images out.

    Example:
        >>> digits = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
        >>> collect_images(digits).shape
        torch.Size([2, 1, 8, 8])
    """
    if isinstance(train, Tensor):
        images = train
    elif isinstance(train, DataLoader):
        images = _join([_image(batch) for batch in train], torch.cat)
        _check_complete(train, len(images))
    elif hasattr(train, "__getitem__") and hasattr(train, "__len__"):
        images = _join([_image(train[i]) for i in range(len(train))], torch.stack)
    else:
        raise TypeError(
            "Argument `train` expected a tensor, a map-style Dataset or a DataLoader, "
            f"but got {type(train).__name__}. Wrap an iterable data set in a DataLoader."
        )
    if images.ndim != 4:
        raise ValueError(
            f"Argument `train` expected images of shape (N, C, H, W), but got {tuple(images.shape)}. "
            "Add the missing dimensions, e.g. by images[:, None] for grey images."
        )
    return images


def _image(sample: Any) -> Tensor:
    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if not isinstance(image, Tensor):
        raise TypeError(
            f"Argument `train` expected samples that are (or begin with) a tensor, but got {type(image).__name__}. "
            "Give the data set a transform such as torchvision's ToTensor."
        )
    return image


def _join(images: list[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    if not images:
        raise ValueError("Argument `train` expected at least one image, but got an empty set. Check its path or split.")
    shapes = {tuple(image.shape[-3:]) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"Argument `train` expected images of one size, but got {len(shapes)} sizes, among them "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}. Resize them to one size."
        )
    return join(images)


def _check_complete(loader: DataLoader[Any], found: int) -> None:
    """Refuse a loader that hides training images, copies of which would then pass as new."""
    if isinstance(loader.dataset, IterableDataset):
        return
    total = len(cast(Sized, loader.dataset))
    if found < total:
        raise ValueError(
            f"Argument `train` expected a DataLoader over all of its data set's {total} images, but got {found} "
            "(drop_last or a sampler leaves images out). Pass the Dataset, or a Subset of it."
        )


class TrainingSetMetric(BaseMetric):
    """Base of the metrics that compare generated images with a training set.

    The training set is no metric state: it stays out of ``state_dict``, survives ``reset``, and follows
    ``.to(device)``. A tensor is not copied: do not change it in place afterwards.

    Under several processes each process holds the whole training set and updates with its own share of the generated
    images; ``compute`` sums over the processes.

    Args:
        train: as :func:`collect_images`; uint8, or floating point in [0, 1].
        k: neighbours that :meth:`sq_distances` returns.
        features: a network whose features are compared in place of the pixels. The training set goes through it once,
            where the network is; afterwards it follows the metric's device.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: as :func:`collect_images`.
        ValueError: as :func:`collect_images`; if values lie outside [0, 1]; if there are fewer than ``k`` images.
    """

    features: nn.Module | None
    ties = False  # whether neighbours whose distances differ by a rounding error matter, see search_rows

    def __init__(self, train: TrainingSet, *, k: int, features: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features
        images = collect_images(train)
        if len(images) < k:
            raise ValueError(self._too_few(len(images), k))
        self.k = k
        self.image_shape = tuple(images.shape[1:])
        self.train_rows = self.references(self.rows(images, name="train").to(self.device))
        self.train_norms = squared_norms(self.train_rows)

    def _too_few(self, found: int, k: int) -> str:
        return f"Argument `train` expected at least {k} images, but got {found}. Add images."

    def rows(self, images: Tensor, *, name: str) -> Tensor:
        """Return what is compared of each image: its pixels, or its features.

        Args:
            images: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
            name: what error messages call them.

        Returns:
            Shape ``(N, D)``.

        Raises:
            TypeError: as :func:`~lightning_iet.functional.images.image_rows`.
            ValueError: as :func:`~lightning_iet.functional.images.image_rows`; if a feature is not finite.
        """
        pixels = image_rows(images, name=name)
        return pixels if self.features is None else embed_images(self.features, images)

    def references(self, rows: Tensor) -> Tensor:
        """Return what is kept of the training set.

        Args:
            rows: the :meth:`rows` of the training images, shape ``(N, D)``.

        Returns:
            Shape ``(N, D)``: float32, if that takes no more than 1 GiB; a larger uint8 set stays uint8, and is
            converted slice by slice in every search.
        """
        return unit_interval(rows) if rows.numel() <= _FLOATS else rows

    def sq_distances(self, generated: Tensor) -> Tensor:
        """Return the squared distances to the ``k`` nearest training images.

        Args:
            generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

        Returns:
            Shape ``(Q, k)``, ascending.

        Raises:
            TypeError: if ``generated`` is no tensor, or neither uint8 nor floating point.
            ValueError: if its images have another shape than the training images, or values outside [0, 1].
        """
        rows = self.generated_rows(generated)
        return search_rows(rows, self.train_rows, self.k, norms=self.train_norms, ties=self.ties)[0]

    def generated_rows(self, generated: Tensor) -> Tensor:
        """Return the :meth:`rows` of generated images of the training images' shape.

        Args:
            generated: as :meth:`sq_distances`.

        Returns:
            Shape ``(Q, D)``.

        Raises:
            TypeError: as :meth:`sq_distances`.
            ValueError: as :meth:`sq_distances`.
        """
        if isinstance(generated, Tensor) and tuple(generated.shape[1:]) != self.image_shape:
            raise ValueError(
                f"Argument `generated` expected shape (N, {', '.join(map(str, self.image_shape))}), as the training "
                f"images have it, but got {tuple(generated.shape)}. Resize or convert the images first."
            )
        rows = self.rows(generated, name="generated")
        return rows if len(rows) else self.train_rows[:0]  # no images, no width

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "TrainingSetMetric":
        """Take the training set along to another device, but never to another dtype."""
        super()._apply(fn, exclude_state)
        self.train_rows = self.train_rows.to(self.device)
        self.train_norms = self.train_norms.to(self.device)
        return self
