"""The weights that a checkpoint shows."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from lightning_iet.shards.engine import ShardEngine

__all__ = ["average_saved"]


def average_saved(module: LightningModule, engine: ShardEngine) -> Callable[[dict[str, Any]], None]:
    """The module's ``on_save_checkpoint``, called for full checkpoints and for weights alone, with the average.

    Args:
        module: The model; its own ``on_save_checkpoint`` is called, and sees the average too.
        engine: Its shards.
    """
    own = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        with engine.average_shown():
            # Copies: a view of the flat tensor would be saved with all of it.
            checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            own(checkpoint)

    return on_save_checkpoint
