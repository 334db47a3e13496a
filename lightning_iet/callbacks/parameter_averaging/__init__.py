"""Iterative ensemble training: shard models that train alone and are averaged at intervals."""

from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback

__all__ = ["ParameterAveragingCallback"]
