"""The two protocols by which a module hands over its per-sample losses."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self, TypeAlias, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_iet.functional.anti_gradient import masked_mean
from lightning_iet.functional.sample_record import weighted_mean
from lightning_iet.utilities.lightning import patched_attribute


class Selection(NamedTuple):
    """Which samples of a batch stay in the loss."""

    keep: Tensor
    """Boolean, shape (B,)."""
    divisor: Tensor | int | None = None
    """What the sum of their losses is divided by; None = their number. See
    :func:`~lightning_iet.functional.anti_gradient.masked_mean`."""

    weights: Tensor | None = None
    """Weights of the losses, shape (B,), not negative; None = all alike."""

    def mean(self, losses: Tensor) -> Tensor:
        """Average the losses of these samples."""
        if self.weights is None:
            return masked_mean(losses, self.keep, divisor=self.divisor)
        return weighted_mean(losses, self.weights * self.keep, divisor=self.divisor)

    def factors(self, dtype: torch.dtype) -> Tensor:
        """What to multiply the gradient of the mean of all losses by, for each sample, (B,)."""
        factors = self.keep.to(dtype)
        if self.weights is not None:
            factors = factors * self.weights.to(dtype)
        divisor = self.divisor
        if divisor is None:
            divisor = factors.sum().clamp(min=1 if self.weights is None else torch.finfo(dtype).tiny)
        return factors * (len(factors) / divisor)


Select: TypeAlias = Callable[[Tensor, Tensor], Selection | None]
"""Takes the losses (B,) and timesteps (B,) of a training batch; returns which samples stay, None = leave the loss."""


class UnsupportedModule(ValueError):
    """The losses of a module cannot be found; the message says why, and what to do."""


class LossSource:
    """Where the per-sample losses of a module come from; this base finds none.

    Attributes:
        module: The module.
        select: Called once for each training batch.
        description: Where the losses and timesteps come from, for the log; empty until that is known.
        caution: What the user should know besides; empty if nothing.
        is_measuring: Whether losses are shown for their own sake, without a backward pass.
    """

    description: str = ""
    caution: str = ""
    is_measuring: bool = False
    module: pl.LightningModule
    select: Select

    @property
    def active(self) -> "LossSource":
        """The source at work: this one, or its fallback."""
        return self

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Show the losses while this lasts; leave nothing behind."""
        yield self

    def begin_step(self) -> None:
        """A training step begins."""

    def before_backward(self, loss: Tensor | None = None) -> None:
        """A backward pass is about to begin; raises if no losses were found, and AGC would do nothing."""

    def end_step(self) -> None:
        """The training step is over."""

    def measure(self, step: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
        """Return the losses and timesteps that ``step``, which calls ``training_step``, shows without a backward pass.

        To be called after a backward pass has shown where they are.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def record(losses: Tensor, timesteps: Tensor) -> None:
            found.append((losses.detach(), timesteps.detach()))

        with patched_attribute(self, "select", record), patched_attribute(self, "is_measuring", True):
            self._measure(step)
        return found

    def _measure(self, step: Callable[[], Any]) -> None:
        with torch.no_grad():
            step()


class ReducerLosses(LossSource):
    """Puts a masked mean in the place of ``module.loss_reducer``, a callable (sample_loss, timesteps) -> scalar.

    Losses without a graph are left alone: they belong to validation.

    Args:
        module: Its ``training_step`` calls its attribute ``loss_reducer``.
        select: See :data:`Select`.
    """

    def __init__(self, module: pl.LightningModule, select: Select) -> None:
        self.module = module
        self.select = select
        self._reduce = cast(Callable[[Tensor, Tensor], Tensor], module.loss_reducer)

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Replace the reducer while this lasts."""
        with patched_attribute(self.module, "loss_reducer", self._reducer):
            yield self

    def _reducer(self, sample_loss: Tensor, timesteps: Tensor) -> Tensor:
        if not sample_loss.requires_grad and not self.is_measuring:
            return self._reduce(sample_loss, timesteps)
        selection = self.select(sample_loss, timesteps)
        self.description = "losses and timesteps from the attribute `loss_reducer`"
        return self._reduce(sample_loss, timesteps) if selection is None else selection.mean(sample_loss)

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Refuse a step that has not called the reducer."""
        if not self.description:
            raise ValueError(
                f"AntiGradientControl expected {type(self.module).__name__}.training_step to call `loss_reducer` on"
                " losses that require a gradient, but got no such call. Call it, or rename that attribute."
            )


class TrainingStepLosses(LossSource):
    """Wraps ``module.training_step`` and puts a masked mean in the place of the ``loss`` that it returns.

    A ``training_step`` that returns None skips the batch, as Lightning defines it.

    Args:
        module: Its ``training_step`` returns a dict with ``loss``, ``sample_loss`` (B,) and ``timesteps`` (B,).
        select: See :data:`Select`.
        fallback: Is open until the first step has returned such a dict, and remains if it returns something else.
            Without it, something else is an error: TypeError, or ValueError if a key is missing.
    """

    _KEYS = ("loss", "sample_loss", "timesteps")

    def __init__(self, module: pl.LightningModule, select: Select, fallback: LossSource | None = None) -> None:
        self.module = module
        self.select = select
        self._fallback = fallback
        self._is_settled = fallback is None
        self._stack = ExitStack()

    @property
    def active(self) -> LossSource:
        """The fallback, while it is open."""
        return self._fallback or self

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Wrap the step while this lasts."""
        step: Callable[..., Any] = self.module.training_step

        @functools.wraps(step)  # Lightning reads the signature through __wrapped__
        def masked_training_step(*args: Any, **kwargs: Any) -> Any:
            return self._mask(step(*args, **kwargs))

        with self._stack:
            if self._fallback is not None:
                self._stack.enter_context(self._fallback.opened())
            with patched_attribute(self.module, "training_step", masked_training_step):
                yield self

    def _mask(self, outputs: Any) -> Any:
        if outputs is None:
            return None
        if not self._is_settled and isinstance(outputs, Mapping) and all(key in outputs for key in self._KEYS):
            self._stack.close()
            self._fallback = None
        self._is_settled = True
        if self._fallback is not None:
            return outputs
        self._check(outputs)
        selection = self.select(outputs["sample_loss"], outputs["timesteps"])
        self.description = "losses and timesteps from the dict that `training_step` returns"
        return outputs if selection is None else {**outputs, "loss": selection.mean(outputs["sample_loss"])}

    def _check(self, outputs: Any) -> None:
        remedy = 'Return {"loss": ..., "sample_loss": (B,), "timesteps": (B,)}.'
        if not isinstance(outputs, Mapping):
            raise TypeError(
                f"AntiGradientControl expected a dict from `training_step`, but got {type(outputs).__name__}. {remedy}"
            )
        missing = [key for key in self._KEYS if key not in outputs]
        if missing:
            raise ValueError(
                f"AntiGradientControl expected the keys 'loss', 'sample_loss' and 'timesteps' from `training_step`,"
                f" but got {sorted(map(str, outputs))} without {missing}. {remedy}"
            )
        for key in ("sample_loss", "timesteps"):
            if not isinstance(outputs[key], Tensor):
                raise TypeError(f"Argument `{key}` expected a tensor, but got {type(outputs[key]).__name__}. {remedy}")
