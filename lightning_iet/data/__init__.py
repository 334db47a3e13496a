"""Where samples come from."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.data.augmentation import Augmented
    from lightning_iet.data.folders import CaptionFolderDataModule, ImageFolderDataModule
    from lightning_iet.data.hugging_face import HuggingFaceDataModule
    from lightning_iet.data.images import ImageDataModule, IndexedImages
    from lightning_iet.data.known_sets import (
        CIFAR10DataModule,
        CIFAR100DataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
    )
    from lightning_iet.data.samples import DrawnByWeight, WithIndex
    from lightning_iet.data.shard_sampler import SeededSamples, ShardBatch, ShardPlan, ShardSampler
    from lightning_iet.data.sharding import ShardedDataModule
    from lightning_iet.data.web_dataset import WebDatasetDataModule
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Augmented",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CaptionFolderDataModule",
    "DigitsDataModule",
    "DrawnByWeight",
    "FashionMNISTDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "IndexedImages",
    "SeededSamples",
    "ShardBatch",
    "ShardPlan",
    "ShardSampler",
    "ShardedDataModule",
    "WebDatasetDataModule",
    "WithIndex",
]
