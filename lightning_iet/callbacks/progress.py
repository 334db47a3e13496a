"""One progress bar for the whole run, and one line about the model."""

import time
from math import ceil
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback
from lightning_iet.utilities.lightning import find_callback


class ParameterSummary(Callback):
    """Logs one line about the model when training starts: parameters that train, that are frozen, and averaged ones.

    Example:
        >>> from torch import nn
        >>> ParameterSummary.line(nn.Linear(9, 1))
        'Linear: 10 parameters train, 0 are frozen; no average of the weights (EMA) is kept.'
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it."""
        rank_zero_info(self.line(pl_module))

    @staticmethod
    def line(module: nn.Module) -> str:
        """Return the line for a module, whose average of the weights, if it keeps one, is ``module.ema``."""
        ema = getattr(module, "ema", None)
        averaged = {id(parameter) for parameter in ema.parameters()} if isinstance(ema, nn.Module) else set()
        others = [parameter for parameter in module.parameters() if id(parameter) not in averaged]
        trained = sum(parameter.numel() for parameter in others if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in others) - trained
        kept = (
            "an average of the weights (EMA) is kept" if ema is not None else "no average of the weights (EMA) is kept"
        )
        return f"{type(module).__name__}: {trained:,} parameters train, {frozen:,} are frozen; {kept}."


class RunProgressBar(ProgressBar):
    """Shows the run as one bar with its remaining time, and the current epoch, round and shard.

    Lightning's own bars restart with every epoch; on small data an epoch takes a fraction of a second, and its bar does
    not tell when the run will end. Where standard error is a file, the state is written as a line now and then.

    Args:
        refresh_seconds: Least time between two updates in a terminal; in a file it is 60 times as long.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.progress: Progress | None = None
        self._enabled = True
        self._updated = 0.0
        self._metrics = ""

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar, at the step at which the run (re)starts."""
        if not self._enabled:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        fields = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"))
        self.progress = Progress(*columns, *fields, console=Console(stderr=True), auto_refresh=False)
        self.progress.add_task(
            "Training",
            total=num_batches(trainer),
            completed=trainer.fit_loop.epoch_loop.total_batch_idx + 1,
            speed="",
            metrics="",
        )
        if self.progress.console.is_terminal:
            self.progress.start()
        self._updated, self._metrics = time.monotonic(), ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one step, and say which shard took it."""
        if self.progress is None:
            return
        task = self.progress.tasks[0]
        self.progress.advance(task.id)
        in_terminal = self.progress.console.is_terminal
        if time.monotonic() - self._updated < self.refresh_seconds * (1 if in_terminal else 60):
            return
        self._updated = time.monotonic()
        speed = f"{task.speed:.3g} step/s" if task.speed else ""
        description = position_in_run(trainer)
        self.progress.update(task.id, description=description, speed=speed, metrics=self._metrics, refresh=in_terminal)
        if not in_terminal:
            of_all = "" if task.total is None else f" of {task.total:.0f}"
            line = ", ".join(filter(None, (description, f"step {task.completed:.0f}{of_all}", speed, self._metrics)))
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the values that modules log for the progress bar."""
        if self.progress is not None:
            values = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
            self._metrics = ", ".join(f"{name}={value:.3g}" for name, value in values.items())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def num_batches(trainer: Trainer) -> int | None:
    """Return the number of batches of a whole run, by ``max_epochs`` and ``max_steps``; None where it is not known."""
    per_epoch, epochs, steps = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    if not isinstance(per_epoch, int):  # a stream
        return None
    limits = [per_epoch * epochs] if epochs is not None and epochs > 0 else []
    if steps > 0 and trainer.lightning_module.automatic_optimization:  # else a batch may take any number of steps
        in_epochs, left = divmod(steps, ceil(per_epoch / trainer.accumulate_grad_batches))
        limits.append(per_epoch * in_epochs + trainer.accumulate_grad_batches * left)
    return min(limits, default=None)


def position_in_run(trainer: Trainer) -> str:
    """Say where a run is, such as ``epoch 12/40, round 2/4, shard 3/8``."""
    epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or -1
    parts = [f"epoch {epoch}/{epochs}" if epochs > 0 else f"epoch {epoch}"]
    averaging = find_callback(trainer, ParameterAveragingCallback)
    if averaging is None or averaging.engine is None:
        return parts[0]
    every, engine = averaging.every_n_epochs, averaging.engine
    if every is not None and epochs > 0:
        parts.append(f"round {-(-epoch // every)}/{-(-epochs // every)}")
    num_shards = len(engine.sizes)
    parts.append(f"{num_shards} shards" if engine.active is None else f"shard {engine.active + 1}/{num_shards}")
    return ", ".join(parts)
