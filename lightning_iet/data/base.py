"""The base of our data modules: one of either Lightning's."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_iet.utilities.twins import twins

__all__ = ["DataModule"]

if TYPE_CHECKING:

    class DataModule(pl.LightningDataModule):
        """A data module for ``import lightning`` and ``import pytorch_lightning``."""

else:
    DataModule = type("DataModule", twins("LightningDataModule"), {"__doc__": "A data module for both Lightnings."})
