"""Where samples come from."""

from lightning_iet.data.digits import DigitsDataModule
from lightning_iet.data.images import ImageDataModule, IndexedImages
from lightning_iet.data.sharding import SeededSamples, ShardBatch, ShardedDataModule, ShardPlan, ShardSampler

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "IndexedImages",
    "SeededSamples",
    "ShardBatch",
    "ShardPlan",
    "ShardSampler",
    "ShardedDataModule",
]
