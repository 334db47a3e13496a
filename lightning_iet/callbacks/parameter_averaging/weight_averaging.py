"""Averages of the weights that are kept outside of parameters and buffers, one for each shard."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_iet.shards.ema import tensors_beside
from lightning_iet.shards.engine import ShardEngine
from lightning_iet.shards.state import weight_averagings
from lightning_iet.utilities.lightning import Callback, patched_attribute

Saving = Callable[[dict[str, Any]], None]


class KeptBeside(Callback):
    """Averages in plain tensors: their numbers are each shard's, and tensors that a module replaces stay so too.

    Args:
        module: About to be trained.
    """

    def __init__(self, module: LightningModule) -> None:
        self._tensors, self._numbers = tensors_beside(module)
        self._ours = [place.get() for place in self._tensors]

    def __bool__(self) -> bool:
        return bool(self._tensors or self._numbers)

    def shard_state(self) -> dict[str, Tensor]:
        """The numbers of the shard at work; takes back tensors that have been replaced (``shadow[name] = …``)."""
        for place, ours in zip(self._tensors, self._ours, strict=True):
            theirs = place.get()
            if theirs is not ours:
                ours.data.copy_(theirs)
                place.set(ours)
        numbers = {place.name: place.get() for place in self._numbers}
        return {
            name: torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
            for name, number in numbers.items()
            if number is not None
        }

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's numbers in place."""
        for place in self._numbers:
            if place.name in state:
                place.set(state[place.name].item())


class ShardedAverage(Callback):
    """Lets a ``WeightAveraging`` callback of Lightning's work for the shard whose step it is, and count its steps.

    Its average model is part of the shards' states already (see :func:`~lightning_iet.shards.shard_tensors`). Its
    training hooks are called here, in the turn of the shard and before shards are averaged.

    Args:
        callback: Of Lightning's.
        global_step: Optimizer steps that this process has taken in runs before.
    """

    def __init__(self, callback: Any, *, global_step: int) -> None:
        self.callback = callback
        self._hooks = callback.on_train_batch_end, callback.on_train_epoch_end
        self._steps, self._global_steps = 0, global_step

    def step(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """After a batch of the shard at work; the callback sees the shard's own number of optimizer steps."""
        self._steps += trainer.global_step - self._global_steps
        self._global_steps = trainer.global_step
        self._hooks[0](_OwnSteps(trainer, self._steps), module, *args)

    def end_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last batch of the shard at work in an epoch."""
        self._hooks[1](trainer, module)

    def shard_state(self) -> dict[str, Tensor]:
        """Counts of the shard at work."""
        callback = self.callback
        return {
            "steps": torch.tensor(self._steps),
            "latest_update_step": torch.tensor(callback._latest_update_step),
            "latest_update_epoch": torch.tensor(callback._latest_update_epoch),
        }

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's counts in place."""
        self._steps = int(state["steps"])
        self.callback._latest_update_step = int(state["latest_update_step"])
        self.callback._latest_update_epoch = int(state["latest_update_epoch"])


@contextmanager
def called_early(module: LightningModule) -> Iterator[Callable[..., None]]:
    """A module's ``on_train_batch_end``, to be called by us; Lightning, which calls it after the callbacks, calls none.

    Many modules update their average of the weights in it. Called after the callbacks, it would find the shards
    averaged already in the last batch of a round, and checkpoints would lack the update of their step.
    """
    hook = module.on_train_batch_end
    with patched_attribute(module, "on_train_batch_end", _nothing):
        yield hook


class _OwnSteps:
    """A trainer that has taken the steps of one shard."""

    def __init__(self, trainer: Trainer, global_step: int) -> None:
        self._trainer = trainer
        self.global_step = global_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The place of a hook that is called elsewhere."""


@contextmanager
def keep_averages(trainer: Trainer, module: LightningModule) -> Iterator[list[ShardedAverage]]:
    """Sees that averages of the weights are each shard's, wherever they are kept; to be entered before the shards are.

    Yields:
        Those that Lightning's callbacks keep. Their hooks are not called by Lightning inside.
    """
    averages = [ShardedAverage(kept, global_step=trainer.global_step) for kept in weight_averagings(trainer)]
    beside = [kept for kept in (KeptBeside(module),) if kept]
    trainer.callbacks = [*trainer.callbacks, *averages, *beside]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for average in averages:
            average.callback._average_model.to(module.device)  # beside the weights, with which it is exchanged
            for hook in ("on_train_batch_end", "on_train_epoch_end"):
                stack.enter_context(patched_attribute(average.callback, hook, _nothing))
        yield averages


def averages_saved(
    saving: Callable[[dict[str, Any]], None],
    module: LightningModule,
    engine: ShardEngine,
    averages: list[ShardedAverage],
) -> Callable[[dict[str, Any]], None]:
    """The module's ``on_save_checkpoint`` where Lightning's callbacks have an average of their own to save.

    Args:
        saving: From :func:`~lightning_iet.shards.engine.average_saved`, which saves the average of the weights.
        module: The model.
        engine: Its shards.
        averages: Of Lightning's callbacks, which put the average of the shards' averages in place.
    """

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        full = "current_model_state" in checkpoint  # not in those of weights alone
        saving(checkpoint)
        if not full:
            return
        with engine.average_shown():
            for average in averages:
                average.callback.on_save_checkpoint(engine.trainer, module, checkpoint)
            # Copies: a view of the flat tensor would be saved with all of it.
            for part in ("state_dict", "averaging_state"):
                checkpoint[part] = {name: tensor.clone() for name, tensor in checkpoint[part].items()}

    return on_save_checkpoint
