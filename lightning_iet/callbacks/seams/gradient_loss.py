"""The stand-in for a loss that nobody saw: the squared gradient at the denoiser's output."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_iet.callbacks.seams.base import Observer, Refusal
from lightning_iet.callbacks.seams.denoiser_call import DenoiserCall, Verdict

__all__ = ["GradientLoss"]


class GradientLoss:
    r"""Measures losses where no error operation was seen: in a compiled function, or a kernel of somebody's own.

    For a squared error :math:`L = \frac{1}{B} \sum_i w(t_i) \lVert o_i - y_i \rVert^2`, the rows of the gradient at the
    output hold :math:`\lVert B\, \partial L / \partial o_i \rVert^2 = 4 w(t_i)^2 \lVert o_i - y_i \rVert^2`: the
    sample's loss times a constant of its timestep, which cancels against the loss bank's entry. For an absolute error
    they hold nothing at all, which is found in the first batch.

    Args:
        observe: Gets losses and timesteps.
        scale: Multiplies a number by what the loss is multiplied by before the backward pass (AMP).
    """

    def __init__(self, observe: Observer, scale: Callable[[Tensor], Tensor] | None = None) -> None:
        self.observe = observe
        self.scale = scale
        self.in_use = False
        self._expected: DenoiserCall | None = None

    def expect(self, call: DenoiserCall) -> None:
        """The gradient of this call comes next."""
        self._expected = call

    def expects(self, call: DenoiserCall) -> bool:
        """Whether this is the call whose gradient counts."""
        return call is self._expected

    def measure(self, call: DenoiserCall, gradient: Tensor) -> None:
        """Decide about a call from its gradient, (B, …)."""
        rows = gradient.detach().flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) * len(rows)
        if not self.in_use:
            _refuse_absolute_errors(rows)
        if self.scale is not None:
            rows = rows / self.scale(torch.ones((), device=rows.device))
        verdict = Verdict(rows.square().mean(1), call.timesteps)
        verdict.keep(self.observe(verdict.losses, verdict.timesteps))
        call.verdict, self._expected, self.in_use = verdict, None, True


def _refuse_absolute_errors(rows: Tensor) -> None:
    sizes = rows.abs()
    largest = sizes.amax(1, keepdim=True)
    alike = ((sizes - largest).abs() <= 1e-3 * largest) | (sizes == 0)
    if rows.shape[1] > 1 and bool(alike.all()) and bool(largest.any()):
        raise Refusal(
            "AntiGradientControl expected a squared error where it cannot see the loss itself, but got gradients of one"
            " size, those of an absolute error. Compute the loss outside compiled code, or return it per sample."
        )
