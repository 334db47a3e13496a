"""A small training set in which some images occur many times: memorization shows there within a short training."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset


class RepeatedSubset(pl.LightningDataModule):
    """A part of another data module's training set, some of whose images occur many times.

    The inner training set of MemControl's search (Dutt et al. 2025: one percent of the data, and a subset fifty times),
    where a training of full length is too long to judge every mask by. Memorization is measured on the images that are
    repeated: they are ``train_set``. What is held out stays as it is.

    Args:
        data: The data module; its ``train_dataloader()`` returns one ``DataLoader``.
        subset: Number of training images to keep; None = all.
        repeated: How many of these, the first ones in the order of the seed, occur several times.
        times: How often.
        seed: Seed of the order in which images are chosen.

    Raises:
        ValueError: For numbers out of range; in ``setup``, for more images than there are.

    Example:
        >>> from lightning_iet import DigitsDataModule
        >>> digits = RepeatedSubset(DigitsDataModule(64, batch_size=10), subset=20, repeated=5, times=7)
        >>> digits.setup("fit")
        >>> len(digits.train_set), sum(len(images) for images, _, _ in digits.train_dataloader())
        (5, 50)
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        *,
        subset: int | None = None,
        repeated: int = 0,
        times: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least in (("subset", subset, 1), ("repeated", repeated, 0), ("times", times, 1)):
            if number is not None and number < least:
                raise ValueError(f"Argument `{name}` expected an integer ≥ {least}, but got {number}.")
        self.data = data
        self.subset = subset
        self.repeated = repeated
        self.times = times
        self.seed = seed
        self.prepare_data_per_node = data.prepare_data_per_node

    def __getattr__(self, name: str) -> Any:
        """What only the inner data module has, such as the sets that are held out."""
        if name == "data":  # not yet set: while unpickling
            raise AttributeError(name)
        return getattr(self.data, name)

    def prepare_data(self) -> None:
        """Download the data, where that is asked for."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Choose the images."""
        self.data.setup(stage)
        whole: Dataset[Any] = self.data.train_set  # type: ignore[attr-defined]
        total = len(whole)  # type: ignore[arg-type]
        kept = total if self.subset is None else self.subset
        if kept > total or self.repeated > kept:
            raise ValueError(
                f"Arguments `subset` and `repeated` expected numbers for which the {total} training images suffice, "
                f"but got {self.subset} and {self.repeated}. Ask for fewer."
            )
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:kept].tolist()
        self.train_set = Subset(whole, chosen[: self.repeated] or chosen)
        self.places = chosen + chosen[: self.repeated] * (self.times - 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """The chosen images in the inner loader's batches, shuffled."""
        inner = self.data.train_dataloader()
        return DataLoader(
            Subset(inner.dataset, self.places),
            batch_size=inner.batch_size,
            shuffle=True,
            num_workers=inner.num_workers,
            collate_fn=inner.collate_fn,
            pin_memory=inner.pin_memory,
            worker_init_fn=inner.worker_init_fn,
            persistent_workers=inner.persistent_workers,
        )

    def val_dataloader(self) -> Any:
        """That of the inner data module."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Likewise."""
        return self.data.test_dataloader()
