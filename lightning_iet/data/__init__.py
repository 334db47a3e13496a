"""Where samples come from."""

from lightning_iet.data.digits import DigitsDataModule
from lightning_iet.data.images import ImageDataModule, IndexedImages
from lightning_iet.data.shard_sampler import SeededSamples, ShardBatch, ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.data.with_index import WithIndex

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "IndexedImages",
    "SeededSamples",
    "ShardBatch",
    "ShardPlan",
    "ShardSampler",
    "ShardedDataModule",
    "WithIndex",
]
