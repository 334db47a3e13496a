"""The losses of modules that nobody adapted: forward hooks find the denoiser, tensor hooks mask its gradient."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_iet.callbacks.anti_gradient_control.losses.error_capture import (
    CallError,
    DenoiserCall,
    Entry,
    ErrorOperation,
    ErrorWatch,
    LossCapture,
    NearMiss,
    Origins,
    Verdict,
    argument_names,
    calls_behind,
    fixed_outputs,
    name_arguments,
    nodes_behind,
    owners_behind,
    read_call,
)
from lightning_iet.callbacks.anti_gradient_control.losses.protocols import (
    LossSource,
    ReducerLosses,
    Select,
    TrainingStepLosses,
    UnsupportedModule,
)
from lightning_iet.utilities.lightning import distinct_modules, do_nothing, named_part, patched_attribute


def open_losses(
    module: pl.LightningModule,
    select: Select,
    *,
    denoiser: str | None = None,
    timestep: str | None = None,
    several_optimizers: bool = False,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> AbstractContextManager[LossSource]:
    """Open the first way to the losses of a module: its ``loss_reducer``, the dict of ``training_step``, or hooks.

    Args are those of :class:`DenoiserLosses`; if ``denoiser`` or ``timestep`` is given, the hooks are taken.

    Returns:
        A context manager that gives the open source, to be told where in a training step the run is.

    Example:
        >>> from lightning_iet.callbacks.anti_gradient_control.losses import Selection
        >>> class Denoiser(pl.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         return {"loss": batch.mean(), "sample_loss": batch, "timesteps": torch.tensor([3, 5])}
        >>> module = Denoiser()
        >>> with open_losses(module, lambda losses, timesteps: Selection(losses > 1.0)):
        ...     module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(3.)
        >>> module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(2.)
    """
    is_named = denoiser is not None or timestep is not None
    if not is_named and callable(getattr(module, "loss_reducer", None)):
        return ReducerLosses(module, select).opened()
    hooks = DenoiserLosses(
        module, select, denoiser=denoiser, timestep=timestep, several_optimizers=several_optimizers, scale=scale
    )
    if is_named or not module.automatic_optimization:
        return hooks.opened()
    return TrainingStepLosses(module, select, fallback=hooks).opened()


class DenoiserLosses(LossSource):
    r"""Finds the denoiser in the first step, measures each sample's loss behind its output, and masks its gradient.

    The denoiser is the outermost module whose call, with gradients on, gets a floating tensor and one more number per
    row of it, and returns that tensor's batch and spatial sizes. Rows of the gradient that arrives at its outputs are
    multiplied by :math:`k_i B / \sum_j k_j`, with :math:`k_i` 1 for samples that are kept and 0 for others: whatever
    the loss looks like, what is masked does not pass. The loss that the user logs is not touched.

    Args:
        module: Any LightningModule.
        select: See :data:`~lightning_iet.callbacks.anti_gradient_control.losses.Select`.
        denoiser: Name of the denoiser in the module; by default it is found.
        timestep: Name of its argument; by default it is found.
        several_optimizers: Whether phases of training may alternate, so that a gradient says nothing about a loss.
        scale: Multiplies a number by what the loss is multiplied by before the backward pass.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        select: Select,
        *,
        denoiser: str | None = None,
        timestep: str | None = None,
        several_optimizers: bool = False,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.select = select
        self.denoiser = denoiser
        self.several_optimizers = several_optimizers
        self._gradient_loss = _GradientLoss(select, scale)
        self._origins = Origins()
        self._capture = LossCapture()
        self._watch = ErrorWatch(self._notice, self._origins.follow)
        # By the id of each module: some hash by their state, or compare by other things than identity (torchmetrics).
        self._hooks: dict[int, ExitStack] = {}
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}
        self._calls: list[DenoiserCall] = []
        self._events: list[DenoiserCall | _Noticed] = []  # of the first step: calls, and errors behind them
        self._entered: list[Entry] = []
        self._doubts: list[str] = []
        self._failure: str | None = None
        self._argument = timestep
        self._recording = False
        self._decided = False

    # --- opening and closing ---------------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Hook the module while this lasts; after it nothing is left."""
        if self.several_optimizers and self.denoiser is None:
            self._refuse("it has several optimizers, and which of them trains the denoiser cannot be told")
        found = _modules_to_hook(self.module, self.denoiser)
        self._names = {id(module): name for name, module in found.items()}
        try:
            for module in found.values():
                self._hooks[id(module)] = ExitStack()
                self._hooks[id(module)].enter_context(_hooked(module, self._before_call, self._after_call))
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
        """Record calls from now on."""
        self._recording, self._decided = bool(self._hooks), False

    def end_step(self) -> None:
        """Stop recording; forget the step."""
        self._watch.stop()
        self._recording = False
        self._drop_calls(0)
        self._entered, self._events = [], []
        self._origins.clear()
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
        behind = None if self.description or loss is None else nodes_behind(loss)
        if behind is not None:
            self._leave_out_other_errors(behind)
        if failure := self._capture.failure or self._capture.incomplete():
            self._refuse(f"`{self._name(calls[-1])}` looks like it, but {failure}")
        if not self.description:
            self._settle(calls, loss, behind)
        verdicts = {id(call.verdict): call.verdict for call in calls if call.verdict is not None}
        if verdicts:
            for verdict in verdicts.values():
                verdict.apply(self.select(verdict.losses, verdict.timesteps))
        elif self._capture.description:
            self._refuse(f"this step has no error behind the output of `{self._name(calls[-1])}`, as earlier ones had")
        else:
            self._gradient_loss.expected = calls[-1]
        self._decided = True
        for call in calls:
            call.release()

    def _without_call(self) -> None:
        """A backward pass before which no denoiser was called."""
        if self._decided or (self.description and self.denoiser is not None):
            return
        if self.description:
            self._refuse("this step did not call it with gradients on, as earlier steps did (phases?)")
        doubt = self._failure or (self._doubts[-1] if self._doubts else "")
        self._refuse(doubt or _why_not_found(self.module, self.denoiser))

    def _measure(self, step: Callable[[], Any]) -> None:
        """Run a step with a graph, behind which the losses are found; there is no backward pass through it."""
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

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called. Nothing inside the denoiser is a loss; inside others there may be one."""
        if not self._is_watching():
            return
        if len(self._hooks) == 1 or (not self.description and _is_compiled(module)):
            self._watch.stop()
        unmeasured = [call for call in self._calls if call.verdict is None]
        counts = len(self._calls), len(self._events), self._capture.seen
        self._entered.append(Entry(module, *counts, unmeasured, self._failure))

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A module has returned: if it is the denoiser, losses come next."""
        if not self._is_watching():
            return
        entry = self._entered.pop()
        while entry.module is not module:  # an exception left that one
            entry = self._entered.pop()
        if id(module) not in self._arguments:
            self._arguments[id(module)] = argument_names(module)
        arguments = name_arguments(self._arguments[id(module)], args, kwargs)
        if torch.is_grad_enabled():
            self._read(arguments, output, entry)
        elif not self.description and self._note_target(module, arguments, output):
            self._doubts.append(
                f"`{self._names[id(module)]}` was called without gradients (checkpointing of the old kind?)"
            )
        if self._capture.pending or (self._origins and not self.description):
            self._watch.start()

    def _is_watching(self) -> bool:
        # Checkpointing calls modules again in the backward pass.
        return self._recording and torch._C._current_graph_task_id() == -1

    def _read(self, arguments: Mapping[str, Any], output: Any, entry: Entry) -> None:
        try:
            call = read_call(entry.module, arguments, output, timestep=self._argument)
        except NearMiss as doubt:
            self._doubts.append(f"`{self._names[id(entry.module)]}` looks like it, but {doubt}")
            return
        except CallError as failure:
            self._failure = f"`{self._names[id(entry.module)]}` looks like it, but {failure}"
            self._drop_calls(entry.num_calls)
            del self._events[entry.num_events :]
            return
        if call is None:
            if not self.description:
                self._note_target(entry.module, arguments, output)
            return
        self._drop_calls(entry.num_calls)  # what was called inside it was a part of it
        del self._events[entry.num_events :]
        self._failure = entry.failure
        if self._capture.seen > entry.num_errors:  # and what was computed inside it no loss
            self._capture = LossCapture()
            for other in entry.unmeasured:
                other.verdict = None
        self._calls.append(call)
        if not self.description:
            self._events.append(call)
            self._origins.add(call.module, call.outputs)
        for tensor in call.outputs:
            tensor.register_hook(partial(self._mask, call))
        if not self._gradient_loss.in_use:
            self._capture.begin([call for call in self._calls if call.verdict is None])

    def _drop_calls(self, start: int) -> None:
        for call in self._calls[start:]:
            call.release()
        del self._calls[start:]

    def _note_target(self, module: nn.Module, arguments: Mapping[str, Any], output: Any) -> bool:
        """Remember what a call made that no gradient passes; return whether it looks like a denoiser's."""
        made = fixed_outputs(arguments, output)
        self._origins.add(module, made)
        return bool(made)

    def _notice(self, error: ErrorOperation) -> None:
        if not self.description and calls_behind(error, self._calls):
            self._events.append(_Noticed.of(error, self._origins.foreign(error.result)))
        self._capture.notice(error)
        if not self._capture.pending and self.description:
            self._watch.stop()

    def _leave_out_other_errors(self, behind: Collection[Node]) -> None:
        """Look again for the losses of the first step, if errors were computed that its loss does not depend on."""
        if all(event.node in behind for event in self._events if isinstance(event, _Noticed)):
            return
        self._capture, calls = LossCapture(), []
        for event in self._events:
            if isinstance(event, _Noticed):
                self._capture.notice(event.error, counts=event.node in behind)
                continue
            event.verdict = event.row_map = None
            calls.append(event)
            self._capture.begin([call for call in calls if call.verdict is None])

    def _mask(self, call: DenoiserCall, gradient: Tensor) -> Tensor | None:
        if self._capture.probing or not self._recording:
            return None
        if any(call is other for other in self._calls):
            self.before_backward()  # backward was called without Lightning
        if call is self._gradient_loss.expected:
            self._gradient_loss.measure(call, gradient)
        return call.mask(gradient)

    def _settle(self, calls: list[DenoiserCall], loss: Tensor | None, behind: Collection[Node] | None) -> None:
        """Make sure that the denoiser is found, and hook no other module any more."""
        measured = [call for call in calls if call.verdict is not None]
        masked = measured or calls[-1:]
        names = {id(call.module): self._name(call) for call in masked}
        name = self._name(masked[-1])
        reason = ""
        if len(names) > 1:
            reason = f"there are {len(names)} candidates, {sorted(names.values())}"
        elif self._is_compared(masked[-1].module, behind):
            reason = "its output is compared with another output of a denoiser, as in consistency training"
        reason = reason or _why_loss_escapes(calls, masked, loss, name=name)
        if not measured:
            reason = reason or _why_no_stand_in(masked[-1], name=name, several_optimizers=self.several_optimizers)
        if reason:
            self._refuse(reason)
        for module in [module for module in self._hooks if module not in names]:
            self._hooks.pop(module).close()
        self._watch.look, self._events = None, []
        self._origins.clear()
        self._argument = masked[-1].argument
        self.description = _describe(masked[-1], name=name, loss=self._capture.description)
        self.caution = _eval_mode_caution(masked[-1], name=name)

    def _is_compared(self, denoiser: nn.Module, behind: Collection[Node] | None) -> bool:
        """Whether an error of the loss has something that another denoiser's call made, without a gradient, in it."""
        size = _num_weights(denoiser)
        return any(
            10 * _num_weights(module) >= size  # not a small fixed operator, a blur say, *(our choice)*
            for event in self._events
            if isinstance(event, _Noticed) and (behind is None or event.node in behind)
            for module in event.foreign
        )

    def _name(self, call: DenoiserCall) -> str:
        return self._names[id(call.module)] or type(self.module).__name__

    def _refuse(self, reason: str) -> NoReturn:
        """Say what is wrong with the module, and the things that a user can do besides what was done."""
        expected, remedies = "find the denoiser of", f"{_NAMING}{_RETURNING}"
        if self.denoiser is not None:
            expected, remedies = f"read the losses of `{self.denoiser}` in", f"Let{_RETURNING}"
        kind = type(self.module).__name__
        raise UnsupportedModule(f"AntiGradientControl expected to {expected} {kind}, but {reason}. {remedies}")


# --- hooks -----------------------------------------------------------------------------------------------------------


def _modules_to_hook(root: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """All modules by name but those inside a compiled one, where a hook would be compiled too; or the one named."""
    if name is not None:
        return {name: named_part(root, name)}
    inside = {
        id(part)
        for _, module in distinct_modules(root)
        if _is_compiled(module)
        for _, part in distinct_modules(module)
        if part is not module
    }
    return {name: module for name, module in distinct_modules(root) if id(module) not in inside}


def _is_compiled(module: nn.Module) -> bool:
    in_place = module._compiled_call_impl is not None
    return in_place or hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule)


@contextmanager
def _hooked(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Call ``before`` and ``after`` around every call of a module."""
    compiled = module._compiled_call_impl
    with ExitStack() as stack:
        if compiled is None:
            stack.callback(module.register_forward_pre_hook(_Hook(before), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_Hook(after), with_kwargs=True).remove)
        else:
            # Compiled in place, its hooks are compiled as well: this stands in front of all that.
            def call(*args: Any, **kwargs: Any) -> Any:
                before(module, args, kwargs)
                output = compiled(*args, **kwargs)
                after(module, args, kwargs, output)
                return output

            stack.enter_context(patched_attribute(module, "_compiled_call_impl", call))
        yield


class _Hook:
    """A forward hook that does nothing in a copy of its module, pickled or not."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _Hook, (do_nothing,)


# --- losses that no error operation shows ----------------------------------------------------------------------------


class _GradientLoss:
    r"""Measures losses where no error operation was seen: in a compiled function, or a custom kernel.

    For a squared error :math:`L = \frac{1}{B} \sum_i w(t_i) \lVert o_i - y_i \rVert^2`, the rows of the gradient at the
    output hold :math:`\lVert B\, \partial L / \partial o_i \rVert^2 = 4 w(t_i)^2 \lVert o_i - y_i \rVert^2`: the
    sample's loss times a constant of its timestep, which cancels against the loss bank's entry. For an absolute error
    they hold nothing at all, which is found in the first batch.
    """

    def __init__(self, select: Select, scale: Callable[[Tensor], Tensor] | None = None) -> None:
        self.select = select
        self.scale = scale
        self.in_use = False
        self.expected: DenoiserCall | None = None  # the call whose gradient counts, which comes next

    def measure(self, call: DenoiserCall, gradient: Tensor) -> None:
        """Decide about a call from its gradient, (B, …)."""
        rows = gradient.detach().flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) * len(rows)
        if not self.in_use:
            _refuse_absolute_errors(rows)
        if self.scale is not None:
            rows = rows / self.scale(torch.ones((), device=rows.device))
        verdict = Verdict(rows.square().mean(1), call.timesteps)
        verdict.apply(self.select(verdict.losses, verdict.timesteps))
        call.verdict, self.expected, self.in_use = verdict, None, True


def _refuse_absolute_errors(rows: Tensor) -> None:
    sizes = rows.abs()
    largest = sizes.amax(1, keepdim=True)
    alike = ((sizes - largest).abs() <= 1e-3 * largest) | (sizes == 0)
    if rows.shape[1] > 1 and bool(alike.all()) and bool(largest.any()):
        raise UnsupportedModule(
            "AntiGradientControl expected a squared error where it cannot see the loss itself, but got gradients of one"
            " size, those of an absolute error. Compute the loss outside compiled code, or return it per sample."
        )


@dataclass
class _Noticed:
    """An error in the first step, before it is known which the loss depends on."""

    error: ErrorOperation
    node: Node | None
    foreign: list[nn.Module]  # whose outputs it has in it, through operations that pass no gradient on

    @classmethod
    def of(cls, error: ErrorOperation, foreign: list[nn.Module]) -> Self:
        """Keep the elements as they are now: a step may change them in place."""
        elements = error.elements().clone()
        return cls(replace(error, elements=lambda: elements), error.result.grad_fn, foreign)


def _num_weights(module: nn.Module) -> int:
    weights = [weight for _, part in distinct_modules(module) for weight in part._parameters.values()]
    return sum(weight.numel() for weight in weights if weight is not None)


# --- what is checked and said ----------------------------------------------------------------------------------------


_NAMING = 'Name it, AntiGradientControl(denoiser="…", timestep="…"); or let'
_RETURNING = (
    ' training_step return {"loss", "sample_loss", "timesteps"}; or reduce its losses by an attribute'
    " loss_reducer(sample_loss, timesteps)."
)


def _why_not_found(module: nn.Module, denoiser: str | None) -> str:
    """What to say of a step in which nothing looked like a denoiser."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return "all of it is compiled, where nothing can be seen; compile the denoiser instead"
    who = "no module was" if denoiser is None else f"`{denoiser}` was not"
    return f"{who} called with gradients on, a batch and one number per row of it"


def _why_loss_escapes(
    calls: Sequence[DenoiserCall], masked: Sequence[DenoiserCall], loss: Tensor | None, *, name: str
) -> str:
    """Why masking some of the calls of a step does not mask its loss; empty if it does, or that cannot be known."""
    if loss is None:
        return ""
    reached = owners_behind(loss, {node: number for number, call in enumerate(calls) for node in call.nodes})
    covered = {number for number, call in enumerate(calls) if any(call is other for other in masked)}
    if not reached & covered:
        return f"the loss does not depend on the output of `{name}`"
    if reached - covered:
        return f"the loss depends on {len(reached)} calls of `{name}`, not all of which could be measured"
    return ""


def _why_no_stand_in(call: DenoiserCall, *, name: str, several_optimizers: bool) -> str:
    """Why the gradient at a denoiser's output says nothing about its loss; empty if it may."""
    if several_optimizers:
        reason = "several optimizers train (adversarial phases?)"
    elif len(call.outputs) > 1:
        reason = f"it returns {len(call.outputs)} outputs"
    else:
        return ""
    return (
        f"no squared or absolute error was seen behind `{name}`, and the gradient at its output cannot stand in for it,"
        f" since {reason}"
    )


def _describe(call: DenoiserCall, *, name: str, loss: str) -> str:
    """What was found, for the log."""
    kind = type(getattr(call.module, "_orig_mod", call.module)).__name__
    loss = loss or "the squared gradient at its output (no squared error was seen)"
    return f"denoiser `{name}` ({kind}), timesteps from its argument `{call.argument}`, loss: {loss}"


def _eval_mode_caution(call: DenoiserCall, *, name: str) -> str:
    """What to say of a denoiser that trains in eval mode; empty if it does not."""
    if call.module.training:
        return ""
    return f"The denoiser `{name}` trains in eval mode, without dropout; call `.train()` if not on purpose."
