"""Averages of the weights that Lightning's callbacks, or a module's own attributes, keep: one for each shard."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_iet.shards.ema import unregistered_averages
from lightning_iet.shards.layout import weight_averagings
from lightning_iet.utilities.lightning import do_nothing, patched_attribute


class UnregisteredAverages:
    """Keeps the numbers of averages in plain tensors for each shard, and keeps the tensors that were found in place.

    The tensors themselves are among :func:`~lightning_iet.shards.shard_tensors`.

    Args:
        module: About to be trained.
    """

    def __init__(self, module: LightningModule) -> None:
        self._tensors, self._numbers = unregistered_averages(module)
        self._ours = [slot.get() for slot in self._tensors]

    def __bool__(self) -> bool:
        return bool(self._tensors or self._numbers)

    def shard_state(self) -> dict[str, Tensor]:
        """Return the numbers of the active shard; copy tensors that were replaced (``shadow[name] = …``) into ours."""
        for slot, ours in zip(self._tensors, self._ours, strict=True):
            theirs = slot.get()
            if theirs is not ours:
                ours.data.copy_(theirs)
                slot.set(ours)
        numbers = {slot.name: slot.get() for slot in self._numbers}
        return {
            name: torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
            for name, number in numbers.items()
            if number is not None
        }

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's numbers in place."""
        for slot in self._numbers:
            if slot.name in state:
                slot.set(state[slot.name].item())


class ShardedAverage:
    """Lets a ``WeightAveraging`` callback of Lightning's work for the active shard, and count its steps.

    Its average model is part of the shards' states (see :func:`~lightning_iet.shards.shard_tensors`). Its training
    hooks are called here: while the shard is active, and before shards are averaged.

    Args:
        callback: The callback.
        global_step: Optimizer steps that this process has taken in earlier runs.
    """

    def __init__(self, callback: Any, *, global_step: int) -> None:
        self.callback = callback
        self._hooks = callback.on_train_batch_end, callback.on_train_epoch_end
        self._steps, self._global_steps = 0, global_step

    def step(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """Call the hook after a batch; the callback sees the shard's own number of optimizer steps."""
        self._steps += trainer.global_step - self._global_steps
        self._global_steps = trainer.global_step
        self._hooks[0](_TrainerAtStep(trainer, self._steps), module, *args)

    def end_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Call the hook after the last batch of the active shard in an epoch."""
        self._hooks[1](trainer, module)

    def shard_state(self) -> dict[str, Tensor]:
        """Return the counts of the active shard."""
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


class _TrainerAtStep:
    """A trainer with another ``global_step``."""

    def __init__(self, trainer: Trainer, global_step: int) -> None:
        self._trainer = trainer
        self.global_step = global_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


@contextmanager
def sharded_averages(trainer: Trainer, module: LightningModule) -> Iterator[list[ShardedAverage]]:
    """Take over the training hooks of Lightning's ``WeightAveraging`` callbacks inside a block.

    Yields:
        The callbacks, whose hooks Lightning does not call inside the block.
    """
    averages = [ShardedAverage(kept, global_step=trainer.global_step) for kept in weight_averagings(trainer)]
    with ExitStack() as stack:
        for average in averages:
            average.callback._average_model.to(module.device)  # where the weights are, with which it is exchanged
            for hook in ("on_train_batch_end", "on_train_epoch_end"):
                stack.enter_context(patched_attribute(average.callback, hook, do_nothing))
        yield averages
