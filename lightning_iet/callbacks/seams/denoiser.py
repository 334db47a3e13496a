"""The seam of modules that nobody adapted: forward hooks find the denoiser, tensor hooks mask its gradient."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_iet.callbacks.seams import verification
from lightning_iet.callbacks.seams.base import Observer, Refusal, Seam
from lightning_iet.callbacks.seams.denoiser_call import (
    CallError,
    DenoiserCall,
    Entry,
    NearMiss,
    argument_names,
    name_arguments,
    read_call,
)
from lightning_iet.callbacks.seams.error_operations import ErrorOperation
from lightning_iet.callbacks.seams.error_watch import ErrorWatch
from lightning_iet.callbacks.seams.gradient_loss import GradientLoss
from lightning_iet.callbacks.seams.loss_capture import LossCapture
from lightning_iet.callbacks.seams.module_hooks import hooked, modules_to_hook
from lightning_iet.callbacks.seams.teachers import Teachers

__all__ = ["DenoiserSeam"]


class DenoiserSeam(Seam):
    r"""Finds the denoiser in the first step, measures each sample's loss behind its output, and masks its gradient.

    The denoiser is the outermost module whose call, with gradients on, gets a floating tensor and one more number per
    row of it, and returns that tensor's batch and spatial sizes. Rows of the gradient that arrives at its outputs are
    multiplied by :math:`k_i B / \sum_j k_j`, with :math:`k_i` 1 for samples that are kept and 0 for others: whatever
    the loss looks like, what is masked does not pass. The loss that the user logs is not touched.

    Args:
        module: Any LightningModule.
        observe: Called once per measured batch, see :data:`~lightning_iet.callbacks.seams.Observer`.
        denoiser: Name of the denoiser in the module; by default it is found.
        timestep: Name of its argument; by default it is found.
        several_optimizers: Whether phases of training may alternate, so that a gradient says nothing about a loss.
        scale: Multiplies a number by what the loss is multiplied by before the backward pass.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        observe: Observer,
        *,
        denoiser: str | None = None,
        timestep: str | None = None,
        several_optimizers: bool = False,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.observe = observe
        self.denoiser = denoiser
        self.several_optimizers = several_optimizers
        self._gradient_loss = GradientLoss(observe, scale)
        self._teachers = Teachers()
        self._capture = LossCapture()
        self._watch = ErrorWatch(self._notice, self._teachers.look)
        self._hooks: dict[nn.Module, ExitStack] = {}
        self._names: dict[nn.Module, str] = {}
        self._arguments: dict[nn.Module, list[str]] = {}
        self._calls: list[DenoiserCall] = []
        self._entered: list[Entry] = []
        self._doubts: list[str] = []
        self._refusal: str | None = None
        self._argument = timestep
        self._recording = False
        self._decided = False

    # --- opening and closing ---------------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator["DenoiserSeam"]:
        """Hook the module while this lasts; after it nothing is left."""
        if self.several_optimizers and self.denoiser is None:
            self._refuse("it has several optimizers, and which of them trains the denoiser cannot be told")
        self._names = modules_to_hook(self.module, self.denoiser)
        try:
            for module in self._names:
                self._hooks[module] = ExitStack()
                self._hooks[module].enter_context(hooked(module, self))
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """Take all hooks away, in the middle of a step too."""
        self.end_step()
        for hooks in self._hooks.values():
            hooks.close()
        self._hooks.clear()

    # --- the steps -------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Listen from now on."""
        self._recording, self._decided = bool(self._hooks), False

    def end_step(self) -> None:
        """Listen no longer; forget the step."""
        self._watch.stop()
        self._recording = False
        self._drop_calls(0)
        self._entered = []
        self._capture.begin([])

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Decide about every call of the step that has been measured."""
        self._watch.stop()
        if not self._recording:
            return
        calls, self._calls, self._entered = self._calls, [], []
        if not calls:
            self._without_call()
            return
        if failure := self._capture.failure or self._capture.incomplete():
            self._refuse(f"`{self._name(calls[-1])}` looks like it, but {failure}")
        if not self.description:
            self._settle(calls, loss)
        verdicts = {id(call.verdict): call.verdict for call in calls if call.verdict is not None}
        if verdicts:
            for verdict in verdicts.values():
                verdict.keep(self.observe(verdict.losses, verdict.timesteps))
        elif self._capture.description:
            self._refuse(f"this step has no error behind the output of `{self._name(calls[-1])}`, as earlier ones had")
        else:
            self._gradient_loss.expect(calls[-1])
        self._decided = True
        for call in calls:
            call.release()

    def _without_call(self) -> None:
        """A backward pass before which no denoiser was called."""
        if self._decided or (self.description and self.denoiser is not None):
            return
        if self.description:
            self._refuse("this step did not call it with gradients on, as earlier steps did (phases?)")
        doubt = self._refusal or (self._doubts[-1] if self._doubts else "")
        self._refuse(doubt or verification.why_not_found(self.module, self.denoiser))

    def read(self, step: Callable[[], Any]) -> None:
        """Run a step for its losses. They are told by the graph behind the denoiser, so there is one; nothing uses it.

        Raises:
            Refusal: If losses are measured by gradients.
        """
        if self._gradient_loss.in_use:
            self._refuse("its losses are measured by gradients, of which unseen images have none")
        before = self._recording, self._decided
        self.begin_step()
        try:
            with torch.enable_grad():
                step()
            self.before_backward()
        finally:
            self.end_step()
            self._recording, self._decided = before

    # --- calls -----------------------------------------------------------------------------------------------------

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called. Nothing inside the denoiser is a loss; inside others there may be one."""
        if not self._hears():
            return
        if len(self._hooks) == 1:
            self._watch.stop()
        unmeasured = [call for call in self._calls if call.verdict is None]
        self._entered.append(Entry(module, len(self._calls), unmeasured, self._capture.seen, self._refusal))

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A module has returned: if it is the denoiser, losses come next."""
        if not self._hears():
            return
        entry = self._entered.pop()
        while entry.module is not module:  # an exception left that one
            entry = self._entered.pop()
        if module not in self._arguments:
            self._arguments[module] = argument_names(module)
        arguments = name_arguments(self._arguments[module], args, kwargs)
        if torch.is_grad_enabled():
            self._take(arguments, output, entry)
        elif not self.description and self._teachers.add(arguments, output):
            self._doubts.append(
                f"`{self._names[module]}` was called without gradients (checkpointing of the old kind?)"
            )
        if self._capture.pending:
            self._watch.start()

    def _hears(self) -> bool:
        # Checkpointing calls modules again in the backward pass.
        return self._recording and torch._C._current_graph_task_id() == -1

    def _take(self, arguments: Mapping[str, Any], output: Any, entry: Entry) -> None:
        try:
            call = read_call(entry.module, arguments, output, timestep=self._argument)
        except NearMiss as doubt:
            self._doubts.append(f"`{self._names[entry.module]}` looks like it, but {doubt}")
            return
        except CallError as failure:
            self._refusal = f"`{self._names[entry.module]}` looks like it, but {failure}"
            self._drop_calls(entry.num_calls)
            return
        if call is None:
            return
        self._drop_calls(entry.num_calls)  # what was called inside it was a part of it
        self._refusal = entry.refusal
        if self._capture.seen > entry.num_errors:  # and what was computed inside it no loss
            self._capture = LossCapture()
            for other in entry.unmeasured:
                other.verdict = None
        self._calls.append(call)
        for tensor in call.outputs:
            tensor.register_hook(partial(self._mask, call))
        if not self._gradient_loss.in_use:
            self._capture.begin([call for call in self._calls if call.verdict is None])

    def _drop_calls(self, start: int) -> None:
        for call in self._calls[start:]:
            call.release()
        del self._calls[start:]

    def _notice(self, error: ErrorOperation) -> None:
        self._capture.notice(error)
        if not self._capture.pending:
            self._watch.stop()

    def _mask(self, call: DenoiserCall, gradient: Tensor) -> Tensor | None:
        if self._capture.probing or not self._recording:
            return None
        if any(call is other for other in self._calls):
            self.before_backward()  # somebody calls backward without asking Lightning
        if self._gradient_loss.expects(call):
            self._gradient_loss.measure(call, gradient)
        return call.mask(gradient)

    def _settle(self, calls: list[DenoiserCall], loss: Tensor | None) -> None:
        """Make sure that the denoiser is found, and hook no other module any more."""
        measured = [call for call in calls if call.verdict is not None]
        masked = measured or calls[-1:]
        names = {call.module: self._name(call) for call in masked}
        name = self._name(masked[-1])
        reason = ""
        if len(names) > 1:
            reason = f"there are {len(names)} candidates, {sorted(names.values())}"
        elif self._teachers.compared:
            reason = "its output is compared with another output of a denoiser, as in consistency training"
        reason = reason or verification.why_loss_escapes(calls, masked, loss, name=name)
        if not measured:
            reason = reason or verification.why_no_stand_in(
                masked[-1], name=name, several_optimizers=self.several_optimizers
            )
        if reason:
            self._refuse(reason)
        for module in [module for module in self._hooks if module not in names]:
            self._hooks.pop(module).close()
        self._watch.look = None
        self._teachers.forget()
        self._argument = masked[-1].argument
        self.description = verification.describe(masked[-1], name=name, loss=self._capture.description)
        self.caution = verification.eval_mode_caution(masked[-1], name=name)

    def _name(self, call: DenoiserCall) -> str:
        return self._names[call.module] or type(self.module).__name__

    def _refuse(self, reason: str) -> NoReturn:
        raise Refusal(verification.refusal_text(self.module, reason))
