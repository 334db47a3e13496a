"""Redistribution: the most skipped samples of each shard move to the next shard."""

from lightning_iet.callbacks.redistribution.callback import Redistribution

__all__ = ["Redistribution"]
