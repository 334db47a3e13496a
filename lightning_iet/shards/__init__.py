"""The shard engine: what differs between shard models, how it is exchanged, and how it is averaged."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.shards.engine import ShardEngine
    from lightning_iet.shards.layout import FlatLayout, shard_tensors
    from lightning_iet.shards.state import ShardState, ShardwiseCallback
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["FlatLayout", "ShardEngine", "ShardState", "ShardwiseCallback", "shard_tensors"]
