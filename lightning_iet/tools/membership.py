"""Membership inference during training: does the module's loss tell its training images from held-out ones?"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_iet.audit.losses import Probing, probe_losses, spread_timesteps
from lightning_iet.data.labels import labels_of
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.metrics.training_set import collect_images

__all__ = ["Membership"]

_IMAGES = 512  # of each set, at most
_TIMESTEPS = 20


class Membership:
    """Attacks a module by its loss.

    Every image has its own noise at 20 timesteps spread over the schedule, the same at every evaluation, so that
    evaluations compare. *(our choice of 20 timesteps and at most 512 images of each set: as much work as drawing 200
    images in 50 steps)*

    Args:
        train: the training set, yielding ``(image in [0, 1], condition, index)``.
        held_out: images that are not trained on, likewise.

    Raises:
        ValueError: if the held-out set has less than two images.
    """

    def __init__(self, train: Dataset[Any], held_out: Dataset[Any]) -> None:
        self.sets = tuple(_Probe(images) for images in (train, held_out))

    def __call__(self, module: pl.LightningModule, *, use_ema: bool) -> dict[str, float]:
        """Return the AUC with its interval, and true positive rates, by the names that loggers know them by.

        Args:
            module: has ``losses(images, timesteps, noise, use_ema=)`` and ``num_timesteps``, as
                :class:`~lightning_iet.DiffusionModule`.
            use_ema: whether the averaged weights are attacked.
        """
        scores = (probe.scores(module, use_ema=use_ema) for probe in self.sets)
        return {f"membership_inference_{name}": float(value) for name, value in membership_inference(*scores).items()}


class _Probe:
    """Images of one set, their conditions, and their numbers."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        total = len(dataset)  # type: ignore[arg-type]
        if total < 2:
            raise ValueError(
                "Argument `measures` expected sets of at least 2 images for membership_inference, but got "
                f"{total}. Hold out more images, or leave this measure out."
            )
        self.places = Probing(images=_IMAGES).choose(total)
        chosen = Subset(dataset, self.places.tolist())  # no other image is read
        self.images, self.labels = collect_images(chosen), labels_of(chosen)

    def scores(self, module: pl.LightningModule, *, use_ema: bool) -> Tensor:
        """Mean loss of each image."""
        steps = spread_timesteps(_TIMESTEPS, int(module.num_timesteps))  # type: ignore[arg-type]
        conditional = getattr(module, "conditioning", None) is not None
        found = [
            probe_losses(
                module,
                self.images[part],
                self.places[part],
                steps,
                seed=0,
                use_ema=use_ema,
                condition=self.labels[part] if conditional and self.labels is not None else None,
            )
            for part in torch.arange(len(self.images)).split(256)
        ]
        return torch.cat(found).double().mean(dim=1)
