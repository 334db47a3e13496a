"""The shard engine: what differs between shard models, how it is exchanged, and how it is averaged."""

from lightning_iet.shards.engine import ShardEngine
from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.state import ShardState, ShardwiseCallback, shard_tensors

__all__ = ["FlatLayout", "ShardEngine", "ShardState", "ShardwiseCallback", "shard_tensors"]
