"""What is checked once a denoiser seems to be found: that what is masked is what trains."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_iet.callbacks.seams.denoiser_call import DenoiserCall
from lightning_iet.callbacks.seams.error_watch import owners_behind

__all__ = ["describe", "eval_mode_caution", "refusal_text", "why_loss_escapes", "why_no_stand_in", "why_not_found"]

_REMEDY = (
    'Name it, AntiGradientControl(denoiser="…", timestep="…"); or let training_step return'
    ' {"loss", "sample_loss", "timesteps"}; or reduce its losses by an attribute loss_reducer(sample_loss, timesteps).'
)


def refusal_text(module: nn.Module, reason: str) -> str:
    """One line: what is wrong with a module, and the three things that a user can do."""
    return f"AntiGradientControl expected to find the denoiser of {type(module).__name__}, but {reason}. {_REMEDY}"


def why_not_found(module: nn.Module, denoiser: str | None) -> str:
    """What to say of a step in which nothing looked like a denoiser."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return "all of it is compiled, where nothing can be seen; compile the denoiser instead"
    who = "no module was" if denoiser is None else f"`{denoiser}` was not"
    return f"{who} called with gradients on, a batch and one number per row of it"


def why_loss_escapes(
    calls: Sequence[DenoiserCall], masked: Sequence[DenoiserCall], loss: Tensor | None, *, name: str
) -> str:
    """Why masking some of the calls of a step does not mask its loss; empty if it does, or nobody can know.

    Args:
        calls: All calls of the step.
        masked: Those whose gradient is masked.
        loss: What is differentiated; None if somebody does that without telling.
        name: Of the denoiser.
    """
    if loss is None:
        return ""
    reached = owners_behind(loss, {node: number for number, call in enumerate(calls) for node in call.nodes})
    covered = {number for number, call in enumerate(calls) if any(call is other for other in masked)}
    if not reached & covered:
        return f"the loss does not depend on the output of `{name}`"
    if reached - covered:
        return f"the loss depends on {len(reached)} calls of `{name}`, not all of which could be measured"
    return ""


def why_no_stand_in(call: DenoiserCall, *, name: str, several_optimizers: bool) -> str:
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


def describe(call: DenoiserCall, *, name: str, loss: str) -> str:
    """What was found, for the log."""
    kind = type(getattr(call.module, "_orig_mod", call.module)).__name__
    loss = loss or "the squared gradient at its output (no squared error was seen)"
    return f"denoiser `{name}` ({kind}), timesteps from its argument `{call.argument}`, loss: {loss}"


def eval_mode_caution(call: DenoiserCall, *, name: str) -> str:
    """What to say of a denoiser that trains in eval mode; empty if it does not."""
    if call.module.training:
        return ""
    return f"The denoiser `{name}` trains in eval mode, without dropout; call `.train()` if not on purpose."
