"""One progress bar for the whole run."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback
from lightning_iet.utilities.lightning import find_callback


class RunProgressBar(ProgressBar):
    """Shows the run as one bar with its remaining time, and the epoch, round and shard that are at work.

    Lightning's own bars restart with every epoch; on small data an epoch takes a fraction of a second, and a bar of it
    says nothing about when the run will end.

    Args:
        refresh_seconds: Least time between two redraws.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls it on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar, at the step at which the run (re)starts."""
        per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
        known = isinstance(per_epoch, int) and epochs is not None and epochs > 0
        self._bar = tqdm(
            desc="Training",
            total=per_epoch * epochs if known and epochs else None,
            initial=trainer.fit_loop.epoch_loop.total_batch_idx + 1,
            unit="step",
            # A file or a batch system's log keeps every redraw.
            mininterval=self.refresh_seconds if sys.stderr.isatty() else 60 * self.refresh_seconds,
            dynamic_ncols=True,
            disable=not self._enabled,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one step, and say whose it was."""
        if self._bar is not None:
            if not self._bar.disable:
                self._bar.set_description_str(whereabouts(trainer), refresh=False)
            self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the values that modules log for the progress bar."""
        if self._bar is None or self._bar.disable:
            return
        values = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def whereabouts(trainer: Trainer) -> str:
    """Where a run is, in words, such as ``epoch 12/40, round 2/4, shard 3/8``."""
    epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or -1
    parts = [f"epoch {epoch}/{epochs}" if epochs > 0 else f"epoch {epoch}"]
    averaging = find_callback(trainer, ParameterAveragingCallback)
    if averaging is None or averaging.engine is None:
        return parts[0]
    every, engine = averaging.every_n_epochs, averaging.engine
    if every is not None and epochs > 0:
        parts.append(f"round {-(-epoch // every)}/{-(-epochs // every)}")
    parts.append(
        f"{len(engine.sizes)} shards" if engine.active is None else f"shard {engine.active + 1}/{len(engine.sizes)}"
    )
    return ", ".join(parts)
