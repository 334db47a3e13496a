"""What the metrics share: the base class, plots, training sets, two samples and cosine distances."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.functional.exhaustive_neighbors import squared_norms
from lightning_iet.functional.neighbors import search_rows
from lightning_iet.metrics.features import embed_images, feature_extractor
from lightning_iet.metrics.features.base import PathLike_


class BaseMetric(Metric):
    """Base of the metrics: what they hold follows the device of the module around them, and never its dtype.

    Half precision (``precision="bf16-true"``) is enough to train by. Distances of copies, and sums over thousands of
    images, it would ruin; so neither states nor training images nor feature networks are converted.
    """

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "BaseMetric":
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)  # type: ignore[arg-type]
        return self


class TwoKindsMetric(BaseMetric):
    """Base of the metrics that are fed two kinds of samples, one kind at a time."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Take in more samples, as ``update``; a batch of one kind has no value of its own to return."""
        self.update(*args, **kwargs)


def joined(state: Tensor | list[Tensor], *, device: torch.device) -> Tensor:
    """Return a list state as one tensor, with no values where there was no update.

    Args:
        state: a list state, which torchmetrics makes a tensor while processes are synchronised.
        device: of the metric.

    Returns:
        The values of all updates, in order.

    Example:
        >>> joined([torch.ones(2), torch.zeros(1)], device=torch.device("cpu"))
        tensor([1., 1., 0.])
        >>> joined([], device=torch.device("cpu"))
        tensor([])
    """
    return dim_zero_cat(state) if len(state) else torch.zeros(0, device=device)


Values = Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]]


class PlottedMetric(BaseMetric):
    """Base of the metrics that are drawn as torchmetrics draws its own."""

    def plot(self, val: Values | None = None, ax: Axes | None = None) -> tuple[FigureBase, Axes]:
        """Draw one result as points, or several as curves.

        Args:
            val: a result of ``compute`` or ``forward``, or several of them; by default ``compute()``.
            ax: where to draw; by default in a new figure.

        Returns:
            The figure and its axes.
        """
        _, axes = self._plot(val, ax)
        drawn = cast(Axes, axes)
        return drawn.figure, drawn


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
            TypeError: as :func:`~lightning_iet.functional.checks.image_rows`.
            ValueError: as :func:`~lightning_iet.functional.checks.image_rows`; if a feature is not finite.
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


class TwoSampleMetric(TwoKindsMetric, PlottedMetric):
    """Base of the metrics of two sets of features, fed like torchmetrics' FID: ``update(images, real=True | False)``.

    All features are kept until ``reset``, in float32. A sampler that repeats images to give every process as many makes
    the figures those of the repeated set. ``forward`` does what ``update`` does, and returns nothing.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour that gives a ball its radius.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    real: list[Tensor]
    generated: list[Tensor]
    width: Tensor

    def __init__(
        self,
        features: PathLike_ | nn.Module = "inception",
        *,
        k: int,
        weights: PathLike_ | None = None,
        reset_real_features: bool = True,
        **kwargs: Any,
    ) -> None:
        if k < 1:
            raise ValueError(f"Argument `k` expected at least 1, but got {k}. Leave it out for the published one.")
        super().__init__(**kwargs)
        self.features = feature_extractor(features, weights=weights)
        self.k, self.reset_real_features = k, reset_real_features
        # Flat, because torchmetrics cannot reduce rows over processes one of which has none.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")
        self.add_state("width", torch.tensor(0), dist_reduce_fx=None)  # of every process

    def update(self, images: Tensor, real: bool) -> None:
        """Take in more images, shape ``(N, C, H, W)``, uint8 or floating point in [0, 1], all real or all generated.

        Raises:
            ValueError: if their features are wider or narrower than those of earlier images.
        """
        rows = embed_images(self.features, images)
        if len(rows):
            width = self._common_width(rows.shape[1])
            self.width = torch.full_like(self.width, width)
            (self.real if real else self.generated).append(rows.flatten().to(self.device))

    def _common_width(self, *more: int) -> int:
        """Return the width of the features of all updates and processes."""
        widths = sorted({width for width in (*self.width.flatten().tolist(), *more) if width})
        if len(widths) > 1:
            raise ValueError(
                "Argument `images` expected images whose features are of one width, but got "
                f"{' and '.join(map(str, widths))}. Resize all images, real and generated, to one size."
            )
        return widths[0]

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the features of generated and real images, shapes ``(M, D)`` and ``(N, D)``.

        Raises:
            ValueError: if there are no images of one kind, or processes have features of several widths.
        """
        generated, real = (joined(state, device=self.device) for state in (self.generated, self.real))
        for name, values in (("generated", generated), ("real", real)):
            if values.numel() == 0:
                raise ValueError(
                    f"{type(self).__name__} expected {name} images, but got none. "
                    f"Call update(images, real={name == 'real'}) first."
                )
        width = self._common_width()
        return generated.reshape(-1, width), real.reshape(-1, width)

    def reset(self) -> None:
        """Drop the images; the real ones stay with ``reset_real_features=False``."""
        real, width = list(self.real), self.width
        super().reset()
        if real and not self.reset_real_features:
            self.real, self.width = real, width


class CosineMetric(TrainingSetMetric, PlottedMetric):
    """Base of the metrics of the cosine distance to the nearest training image.

    Args:
        train: as :class:`~lightning_iet.metrics.base.TrainingSetMetric`.
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    distances: list[Tensor]

    def __init__(
        self,
        train: TrainingSet,
        *,
        features: PathLike_ | nn.Module,
        weights: PathLike_ | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, k=1, features=feature_extractor(features, weights=weights), **kwargs)
        self.add_state("distances", [], dist_reduce_fx="cat")

    def references(self, rows: Tensor) -> Tensor:
        """Return the features of the training set, scaled to length one; those without a direction are left out."""
        return unit_rows(rows[rows.any(dim=1)])

    def update(self, generated: Tensor) -> None:
        """Take in more generated images, shape ``(Q, C, H, W)``."""
        rows = unit_rows(self.generated_rows(generated))
        self.distances.append(nearest_cosine_distance(rows, self.train_rows, norms=self.train_norms))

    def nearest(self) -> Tensor:
        """Return the distances of all updates and processes, shape ``(Q,)``."""
        return joined(self.distances, device=self.device)
