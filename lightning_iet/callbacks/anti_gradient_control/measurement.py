"""Losses of a batch that is not trained on: the module's own training step, run so that nothing changes."""

import copy
import random
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_iet.callbacks.anti_gradient_control.losses import LossSource, UnsupportedModule
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.lightning import do_nothing, patched_attribute
from lightning_iet.utilities.modules import distinct_modules
from lightning_iet.utilities.random import isolated_module


class MeasuredStep:
    """Runs a module's ``training_step`` for its losses alone, without gradients.

    Logging is silenced, random generators and metrics are put back, and the first call after the losses were found is
    checked to change nothing in the module.

    Args:
        trainer: While a fit lasts.
        module: Its module.
        who: Needs the losses; it and what follows are for the message of a refusal.
        expected: What the step is called for.
        remedy: What to do about a refusal.

    Attributes:
        is_skipped: Whether the last step returned None, by which Lightning skips a batch.

    Raises:
        UnsupportedModule: If the module takes optimizer steps itself.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, who: str, expected: str, remedy: str
    ) -> None:
        self.trainer, self.module = trainer, module
        self.who, self.expected, self.remedy = who, expected, remedy
        self._is_checked = self.is_skipped = False
        if not module.automatic_optimization:
            raise self.unsupported("it takes optimizer steps itself (manual optimization)")

    def transfer(self, batch: Any) -> Any:
        """Do what Lightning does to a training batch."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def measure(
        self, source: LossSource, make_batch: Callable[[], Any], batch_idx: int, *, seed: int, is_training: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the losses and timesteps of a batch, as the step shows them.

        Args:
            source: Where the losses of the module come from, open.
            make_batch: Returns the batch, on the device.
            batch_idx: What the step is told.
            seed: Of the random generators, in ``make_batch`` and in the step.
            is_training: Whether the module's parts stay in training or evaluation mode, each as it is; otherwise all
                are in evaluation mode.

        Raises:
            UnsupportedModule: If the step cannot be called on the batch, or changes the module.
        """
        is_known = bool(source.description)  # else the source removes hooks from the module in this step
        before = module_state(self.module) if is_known and not self._is_checked else None
        silent = partial(patched_attribute, self.module, replacement=do_nothing)
        with isolated_module(self.module, seed=seed), _kept_metrics(self.module), silent("log"):
            if not is_training:
                self.module.eval()
            try:
                batch = make_batch()
                with silent("log_dict"), self.trainer.precision_plugin.train_step_context():
                    found = source.measure(partial(self._step, batch, batch_idx))
            except UnsupportedModule:
                raise
            except Exception as error:
                raise self.unsupported(f"it raised {type(error).__name__}: {first_line(error)}") from error
        if before is not None:
            after = module_state(self.module)
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            if changed:
                raise self.unsupported(f"it changed {', '.join(f'`{name}`' for name in changed[:3])}")
            self._is_checked = True
        return found

    def _step(self, batch: Any, batch_idx: int) -> Any:
        step = self.module.training_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        outputs = step(batch, batch_idx) if takes_index else step(batch)
        self.is_skipped = outputs is None
        return outputs

    def unsupported(self, reason: str) -> UnsupportedModule:
        """Return the refusal of a module."""
        return UnsupportedModule(
            f"{self.who} expected {type(self.module).__name__}.training_step {self.expected}, but {reason}."
            f" {self.remedy}"
        )


@contextmanager
def _kept_metrics(module: nn.Module) -> Iterator[None]:
    """Let the metrics of torchmetrics in a module be updated inside a block, and take that back after it."""
    kept = []
    for _, part in distinct_modules(module):
        if isinstance(part, Metric):
            names = [*part._defaults, "_update_count", "_computed", "_forward_cache"]
            kept.append((part, {name: _copied(getattr(part, name, None)) for name in names}))
    try:
        yield
    finally:
        for part, values in kept:
            for name, value in values.items():
                setattr(part, name, value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def module_state(module: nn.Module) -> dict[str, Hashable]:
    """Sum up all attributes of a module and its parts; where two summaries are the same, nothing has changed.

    Nothing that can be seen from outside, that is: not what closures, open files and objects without ``__dict__`` hold.
    It waits for the device.

    Returns:
        Summaries by the name of the attribute.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> before = module_state(module)
        >>> _ = module(torch.rand(4, 2))
        >>> after = module_state(module)
        >>> [name for name in before if before[name] != after[name]]
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parts = [(f"{path}." if path else "", part) for path, part in distinct_modules(module)]
    return {
        prefix + name: _summary(value, 4)
        for prefix, part in parts
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items()
        if name not in ("_trainer", "_fabric", "_parameters", "_buffers", "_modules")
    }


def _summary(value: Any, depth: int) -> Hashable:
    if isinstance(value, Tensor):
        return _checksum(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return _checksum(value.get_state())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random | np.random.RandomState):
        return repr(value.getstate() if isinstance(value, random.Random) else value.get_state())
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    if depth == 0 or isinstance(value, type | nn.Module) or callable(value):
        return id(value)
    if isinstance(value, Mapping):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value.values())[:100])
    if isinstance(value, Sequence | Set):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value)[:100])
    if hasattr(value, "__dict__"):
        return tuple((name, _summary(entry, depth - 1)) for name, entry in vars(value).items())
    return id(value)


def _checksum(tensor: Tensor) -> Hashable:
    if tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tuple(tensor.shape), zlib.crc32(plain.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
