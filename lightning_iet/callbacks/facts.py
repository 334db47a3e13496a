"""What the other callbacks of a run know about it, for its report."""

from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.callbacks.run_history import RunHistory

__all__ = ["curves_of_run", "facts_of_run"]

CallbackT = TypeVar("CallbackT", bound=pl.Callback)


def facts_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, Any]:
    """Length of the training, its shards, and the skip rate of anti-gradient control (threshold 0: it was off)."""
    agc, averaging = _find(trainer, AntiGradientControl), _find(trainer, ParameterAveragingCallback)
    shards = 1 if averaging is None else averaging.num_shards
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": history.seconds(),
        "processes": trainer.world_size,
        "num_shards": trainer.world_size if shards is None else shards,
        "threshold": 0.0 if agc is None else agc.threshold,
        "skip_rate": 0.0 if agc is None else float(agc.skip_rate()),
        "num_timesteps": None if agc is None else agc.num_timesteps,
    }


def curves_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, list[float] | None]:
    """Loss by epoch, and skip rate and loss by timestep where anti-gradient control watched them."""
    agc = _find(trainer, AntiGradientControl)
    return {
        "loss_by_epoch": history.losses(trainer.strategy),
        "skip_rate_by_timestep": None if agc is None else agc.skip_rate_by_timestep().tolist(),
        "loss_by_timestep": None if agc is None else agc.loss_by_timestep().tolist(),
    }


def _find(trainer: pl.Trainer, kind: type[CallbackT]) -> CallbackT | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
