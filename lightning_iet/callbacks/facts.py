"""What the other callbacks of a run know about it, for its report."""

from collections.abc import Mapping
from math import isnan
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch.utils.data import Dataset

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.callbacks.run_history import RunHistory
from lightning_iet.callbacks.unseen_images import HeldOutImages

__all__ = ["curves_of_run", "facts_of_run", "without_unseen"]

CallbackT = TypeVar("CallbackT", bound=pl.Callback)


def facts_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, Any]:
    """Length of the training, its shards, and the skip rate of anti-gradient control (threshold 0: it was off).

    With a reference to unseen images also the gap, see :meth:`~lightning_iet.callbacks.AntiGradientControl.gap`.
    """
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
        "reference": "train" if agc is None else agc.reference,
        "gap": None if agc is None or isnan(agc.gap()) else agc.gap(),
    }


def curves_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, list[float] | None]:
    """Loss by epoch, and skip rate and loss by timestep where anti-gradient control watched them."""
    agc = _find(trainer, AntiGradientControl)
    return {
        "loss_by_epoch": history.losses(trainer.strategy),
        "skip_rate_by_timestep": None if agc is None else agc.skip_rate_by_timestep().tolist(),
        "loss_by_timestep": None if agc is None else agc.loss_by_timestep().tolist(),
        "unseen_loss_by_timestep": None if agc is None else agc.unseen_loss_by_timestep().tolist(),
    }


def without_unseen(trainer: pl.Trainer, control: Dataset[Any]) -> Dataset[Any]:
    """The control images but for those by which anti-gradient control steers training: they are no control any more."""
    agc = _find(trainer, AntiGradientControl)
    images = None if agc is None else agc.unseen_images
    return images.others() if isinstance(images, HeldOutImages) and images.dataset is control else control


def _find(trainer: pl.Trainer, kind: type[CallbackT]) -> CallbackT | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
