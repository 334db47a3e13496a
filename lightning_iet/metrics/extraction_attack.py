"""Extraction attack: images that a generator emits again and again."""

from typing import Any

import torch
from torch import Tensor

from lightning_iet.functional.exhaustive_neighbors import float_rows
from lightning_iet.functional.extraction_attack import Clique, check_min_size, check_tiles, extraction_attack
from lightning_iet.metrics.base import TrainingSet, TrainingSetMetric, joined


class ExtractionAttack(TrainingSetMetric):
    r"""Count cliques of near duplicates among generated images, and those of them that show a training image.

    Two images are near duplicates if

    .. math:: d(x, y) = \max_{t} \sqrt{\frac{1}{|t|} \sum_{p \in t} (x_p - y_p)^2} \le \varepsilon

    over the 16 tiles :math:`t` of a 4x4 grid. A clique is a group of at least ``min_size`` generated images all pairs
    of which are near duplicates; it is extracted if a member is a near duplicate of a training image (Carlini et al.,
    *Extracting Training Data from Diffusion Models*, USENIX Security 2023, arXiv:2301.13188). That one distance and one
    ``eps`` serve for both is our choice, see :func:`~lightning_iet.functional.extraction_attack.extraction_attack`.

    Only images that are emitted ``min_size`` times are found: one exact copy is none. On dull or small images near
    duplicates are common without any copying. Feed held-out real images for comparison: their cliques are the false
    alarms.

    All generated images are kept until ``reset``, in float32, or in uint8 where they come so.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``, 0-d int64 tensors:

    - ``"cliques"``: how many there are.
    - ``"images"``: how many generated images are in one.
    - ``"extracted"``: cliques that show a training image.
    - ``"training_images"``: training images that a clique shows.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        eps: the largest distance of near duplicates, in (0, 1].
        min_size: the smallest clique, at least 2; 10 as published, of 500 images for each caption; other
            numbers of images need another size.
        grid: tiles along each side.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes or values outside [0, 1]; if another argument
            is out of range; in ``compute``, if there are more than 10 million pairs of near duplicates that are not
            equal.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> train, generated = torch.rand(2, 30, 1, 8, 8, generator=draw)
        >>> generated[[3, 5, 8]] = train[7]
        >>> metric = ExtractionAttack(train, min_size=3)
        >>> metric.update(generated)
        >>> metric.compute()
        {'cliques': tensor(1), 'images': tensor(3), 'extracted': tensor(1), 'training_images': tensor(1)}
        >>> metric.cliques()
        [Clique(members=tensor([3, 5, 8]), train=tensor([7]))]
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    settings = ("eps", "min_size", "grid")
    generated: list[Tensor]

    def __init__(
        self, train: TrainingSet, *, eps: float = 0.15, min_size: int = 10, grid: int = 4, **kwargs: Any
    ) -> None:
        check_min_size(min_size)
        super().__init__(train, k=1, **kwargs)
        originals = self.train_rows.reshape(-1, *self.image_shape)
        check_tiles(originals, originals, eps=eps, grid=grid)
        self.eps, self.min_size, self.grid = eps, min_size, grid
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, generated: Tensor) -> None:
        """Take in more generated images, shape ``(Q, C, H, W)``."""
        # Flat, because torchmetrics cannot reduce rows over processes one of which has none.
        self.generated.append(self.generated_rows(generated).flatten())

    def cliques(self) -> list[Clique]:
        """Return the cliques among the images of this process, the largest first; indices count in order of update."""
        generated = joined(_of_one_dtype(self.generated), device=self.device).reshape(-1, *self.image_shape)
        train = self.train_rows.reshape(-1, *self.image_shape)
        return extraction_attack(generated, train, eps=self.eps, min_size=self.min_size, grid=self.grid)

    def compute(self) -> dict[str, Tensor]:
        """Return the counts over all updates and processes."""
        cliques = self.cliques()
        shown = [clique.train for clique in cliques if len(clique.train)]
        counts = {
            "cliques": len(cliques),
            "images": sum(len(clique.members) for clique in cliques),
            "extracted": len(shown),
            "training_images": len(torch.cat(shown).unique()) if shown else 0,
        }
        return {name: torch.tensor(count, device=self.device) for name, count in counts.items()}

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process may have no images, or some in uint8 and others in float32; processes exchange one dtype only.
        self.generated = [float_rows(part) for part in self.generated]
        super()._sync_dist(*args, **kwargs)


def _of_one_dtype(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(state, Tensor) or len({part.dtype for part in state}) < 2:
        return state
    return [float_rows(part) for part in state]
