"""What the metrics share: the base class, training sets to compare with, and sets of two kinds."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.functional.exhaustive_neighbors import squared_norms
from lightning_iet.functional.neighbors import search_rows
from lightning_iet.metrics.features import PathLike_, embed_images, feature_extractor

Values = Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]]
TrainingSet = Tensor | Dataset[Any] | DataLoader[Any]

_FLOATS = 2**28  # values of a training set (1 GiB in float32) up to which it is kept in float32


class BaseMetric(Metric):
    """Base of the metrics: what they hold follows the device of the module around them, and never its dtype.

    Half precision (``precision="bf16-true"``) is enough to train by. Distances of copies, and sums over thousands of
    images, it would ruin; so neither states nor training images nor feature networks are converted.
    """

    is_differentiable = False
    full_state_update = False
    settings: tuple[str, ...] = ()  # attributes that repr shows

    def __repr__(self) -> str:
        """Return the name of the class with the settings, ``MemorizedQuantity(…, k=50)``."""
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in self.settings)})"

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

    def warn_if_empty(self, count: int | Tensor) -> None:
        """Warn that there is no result, where no image was seen in any update; without an update torchmetrics warns.

        Args:
            count: Number of generated images of all processes.
        """
        if self.update_called and not count:
            rank_zero_warn(f"{type(self).__name__} has seen no generated images, so that its result is NaN.")

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "BaseMetric":
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)  # type: ignore[arg-type]
        return self


def _shown(value: Any) -> str:
    if value is None:
        return "pixels"  # the features where there is no network
    if isinstance(value, float):
        return f"{value:.6g}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def joined(state: Tensor | list[Tensor], *, device: torch.device) -> Tensor:
    """Return a list state, which is a tensor while processes are synchronised, as one tensor; empty without updates."""
    return dim_zero_cat(state) if len(state) else torch.zeros(0, device=device)


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
        if not isinstance(train.dataset, IterableDataset) and len(images) < (total := len(cast(Sized, train.dataset))):
            raise ValueError(  # copies of images that it leaves out would pass as new
                f"Argument `train` expected a DataLoader over all of its data set's {total} images, but got "
                f"{len(images)} (drop_last or a sampler leaves images out). Pass the Dataset, or a Subset of it."
            )
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


class TrainingSetMetric(BaseMetric):
    """Base of the metrics that compare generated images with a training set.

    The training set is no metric state: it stays out of ``state_dict``, survives ``reset``, and follows
    ``.to(device)``. A tensor is not copied: do not change it in place afterwards.

    Under several processes each process holds the whole training set and updates with its own share of the generated
    images; ``compute`` sums over the processes.

    Args:
        train: as :func:`collect_images`; uint8, or floating point in [0, 1].
        k: neighbours that :meth:`neighbors` returns.
        features: a network whose features are compared in place of the pixels. The training set goes through it once,
            where the network is; afterwards it follows the metric's device.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: as :func:`collect_images`.
        ValueError: as :func:`collect_images`; if values lie outside [0, 1]; if there are fewer than ``k`` images.
    """

    features: nn.Module | None

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

    def __repr__(self) -> str:
        """Return the name of the class with the number and shape of the training images and the settings."""
        train = f"train=<{len(self.train_rows)} x {self.image_shape}>"
        name, _, settings = super().__repr__()[:-1].partition("(")
        return f"{name}({', '.join(filter(None, (train, settings)))})"

    def _too_few(self, found: int, k: int) -> str:
        return f"Argument `train` expected at least {k} images, but got {found}. Add images."

    def rows(self, images: Tensor, *, name: str) -> Tensor:
        """Return what is compared of each image, its pixels or its features, shape ``(N, D)``; refuse what is none."""
        pixels = image_rows(images, name=name)
        return pixels if self.features is None else embed_images(self.features, images)

    def references(self, rows: Tensor) -> Tensor:
        """Return what is kept of the training set's rows: float32, or uint8 where float32 takes more than 1 GiB."""
        return unit_interval(rows) if rows.numel() <= _FLOATS else rows

    def generated_rows(self, generated: Tensor) -> Tensor:
        """Return the :meth:`rows` of generated images; refuse those of another shape than the training images."""
        if isinstance(generated, Tensor) and tuple(generated.shape[1:]) != self.image_shape:
            raise ValueError(
                f"Argument `generated` expected shape (N, {', '.join(map(str, self.image_shape))}), as the training "
                f"images have it, but got {tuple(generated.shape)}. Resize or convert the images first."
            )
        rows = self.rows(generated, name="generated")
        return rows if len(rows) else self.train_rows[:0]  # no images, no width

    def neighbors(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared distances, ascending, and indices of the ``k`` nearest training images, shape ``(Q, k)``."""
        rows = self.generated_rows(generated)
        return search_rows(rows, self.train_rows, self.k, norms=self.train_norms, ties=False)

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "TrainingSetMetric":
        """Take the training set along to another device, but never to another dtype."""
        super()._apply(fn, exclude_state)
        self.train_rows = self.train_rows.to(self.device)
        self.train_norms = self.train_norms.to(self.device)
        return self


class CosineMetric(TrainingSetMetric):
    """Base of the metrics of the cosine distance to the nearest training image.

    Args:
        train: as :class:`TrainingSetMetric`.
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    settings: tuple[str, ...] = ("features",)
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
        distances = joined(self.distances, device=self.device)
        self.warn_if_empty(len(distances))
        return distances


class TwoKindsMetric(BaseMetric):
    """Base of the metrics that are fed two kinds of samples, one kind at a time."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Take in more samples, as ``update``; a batch of one kind has no value of its own to return."""
        self.update(*args, **kwargs)


class TwoSampleMetric(TwoKindsMetric):
    """Base of the metrics of two sets of features, fed like torchmetrics' FID: ``update(images, real=True | False)``.

    All features are kept until ``reset``, in float32. A sampler that repeats images to give every process as many makes
    the measures those of the repeated set. ``forward`` does what ``update`` does, and returns nothing.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour whose distance is the radius.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    settings = ("features", "k", "reset_real_features")
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
