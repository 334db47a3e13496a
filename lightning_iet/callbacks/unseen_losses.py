"""Losses of images that must teach a model nothing, by the project's own training step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_iet.callbacks.seams import Refusal, Seam
from lightning_iet.callbacks.unseen_images import UnseenImages
from lightning_iet.utilities.module_state import module_state
from lightning_iet.utilities.shadow import shadowed
from lightning_iet.utilities.undisturbed import undisturbed

__all__ = ["UnseenLosses", "check_readable"]


def check_readable(module: pl.LightningModule) -> None:
    """Refuse a module whose training step does more than tell a loss.

    Raises:
        Refusal: If it takes the optimizer steps itself.
    """
    if not module.automatic_optimization:
        raise _refusal(module, "it takes optimizer steps itself (manual optimization)")


class UnseenLosses:
    """Calls a module's ``training_step`` on unseen images and takes down the losses that its seam shows.

    In eval mode, without a backward pass, with logging silenced, and with random generators of its own: training takes
    the course that it would have taken. The first time, it looks whether the step has changed anything in the module.

    Args:
        trainer: At work.
        module: Its module.
        seam: Open, its observer being :meth:`hear` while :attr:`is_listening`.
        images: What to draw from.

    Attributes:
        is_listening: Whether what the seam shows are unseen images.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seam: Seam, images: UnseenImages) -> None:
        self.trainer = trainer
        self.module = module
        self.seam = seam
        self.images = images
        self.is_listening = False
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._is_trusted = False

    def hear(self, sample_loss: Tensor, timesteps: Tensor) -> None:
        """Take down the losses (n,) and timesteps (n,) of unseen images."""
        self._heard.append((sample_loss.detach(), timesteps.detach()))

    def measure(self, size: int, *, seed: int, shard: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Losses and timesteps of a batch of unseen images, both (n,).

        Args:
            size: Number of images.
            seed: Of the images, of their noise and of their timesteps.
            shard: Whose model is at work.
            batch_idx: Of the current training batch.

        Raises:
            Refusal: If the step cannot be called on them, changes the module, or shows no losses.
        """
        before = None if self._is_trusted else module_state(self.module)
        with undisturbed(self.module, seed=seed), self._listening(), shadowed(self.module, "log", _say_nothing):
            self.module.eval()
            try:
                batch = self._on_device(self.images.draw(size, shard=shard, epoch=self.trainer.current_epoch))
                with (
                    shadowed(self.module, "log_dict", _say_nothing),
                    self.trainer.precision_plugin.train_step_context(),
                ):
                    self.seam.read(partial(self._step, batch, batch_idx))
            except Refusal:
                raise
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise _refusal(self.module, f"it raised {type(error).__name__}: {reason}") from error
        if not self._heard:
            raise _refusal(self.module, "it showed no losses")
        if before is not None:
            self._check(before)
        losses, timesteps = zip(*self._heard, strict=True)
        return torch.cat(losses), torch.cat(timesteps)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self._heard, self.is_listening = [], True
        try:
            yield
        finally:
            self.is_listening = False

    def _on_device(self, batch: Any) -> Any:
        """What Lightning does to a training batch."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _step(self, batch: Any, batch_idx: int) -> Any:
        step = self.module.training_step
        numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return step(batch, batch_idx) if numbered else step(batch)

    def _check(self, before: dict[str, Any]) -> None:
        after = module_state(self.module)
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        if changed:
            raise _refusal(self.module, f"it changed {', '.join(f'`{name}`' for name in changed[:3])}")
        self._is_trusted = True


def _refusal(module: nn.Module, reason: str) -> Refusal:
    return Refusal(
        f"AntiGradientControl expected {type(module).__name__}.training_step to tell the losses of unseen images and"
        f" change nothing, but {reason}. Let it do so where `self.training` is False, or use reference='train'."
    )


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """What is logged of unseen images."""
