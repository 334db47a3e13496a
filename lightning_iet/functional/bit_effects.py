"""What switching a bit on changes in a figure, by least squares over many trials."""

from typing import NamedTuple

import torch
from torch import Tensor


class BitEffects(NamedTuple):
    """Effects of bits.

    Attributes:
        effect: mean figure with the bit on minus the mean with it off, float64, shape ``(G,)``; NaN where the bit never
            changed, or where there are too few trials.
        standard_error: of each effect, float64, shape ``(G,)``; NaN without degrees of freedom.
        degrees_of_freedom: of the standard errors, for Student's t.
        joint: whether all bits were fitted together; else each by itself.
    """

    effect: Tensor
    standard_error: Tensor
    degrees_of_freedom: int
    joint: bool


def bit_effects(bits: Tensor, values: Tensor, *, covariates: Tensor | None = None) -> BitEffects:
    r"""Estimate the effect of each bit on a figure.

    Least squares of :math:`y = \beta_0 + \sum_g \beta_g b_g + \sum_c \gamma_c x_c + \varepsilon`; the effect of bit
    :math:`g` is :math:`\hat\beta_g`, its standard error :math:`\sqrt{s^2 [(X^\top X)^{-1}]_{gg}}` with :math:`s^2` the
    residual sum of squares over its degrees of freedom. All bits that vary are fitted together if that leaves at least
    one degree of freedom and the columns are independent; else each bit has a fit of its own *(our choice: a search of
    few trials cannot tell the bits apart, and a bit then also carries the effect of those that went with it)*.

    Args:
        bits: 0 or 1, shape ``(N, G)``.
        values: figure of each trial, shape ``(N,)``.
        covariates: what else may explain the figure, such as the logarithm of the learning rate, shape ``(N, C)``.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
        >>> effects = bit_effects(bits, torch.tensor([1.0, 1.5, 3.0, 3.5, 3.5]))
        >>> effects.effect, effects.degrees_of_freedom, effects.joint
        (tensor([2.0000, 0.5000], dtype=torch.float64), 2, True)
    """
    others = values.new_zeros(len(values), 0) if covariates is None else covariates
    if bits.ndim != 2 or values.shape != bits.shape[:1] or others.shape[:1] != values.shape or others.ndim != 2:
        raise ValueError(
            f"Arguments `bits`, `values` and `covariates` expected shapes (N, G), (N,) and (N, C), but got "
            f"{tuple(bits.shape)}, {tuple(values.shape)} and {tuple(others.shape)}."
        )
    effect = torch.full(bits.shape[1:], torch.nan, dtype=torch.float64)
    error = effect.clone()
    common = torch.cat([torch.ones(len(values), 1, dtype=torch.float64), _varying(others.double())], 1)
    varies = (bits != bits[:1]).any(0).nonzero()[:, 0] if len(bits) else torch.zeros(0, dtype=torch.long)
    design = torch.cat([common, bits[:, varies].double()], 1)
    joint = _is_estimable(design)
    columns = [varies] if joint else list(varies.split(1))
    freedom = len(values) - design.shape[1] if joint else len(values) - common.shape[1] - 1
    for chosen in columns:
        design = torch.cat([common, bits[:, chosen].double()], 1)
        if not _is_estimable(design):
            continue
        inverse = torch.linalg.inv(design.T @ design)
        coefficients = inverse @ design.T @ values.double()
        residual = values.double() - design @ coefficients
        variance = residual.square().sum() / freedom * inverse.diagonal()
        first = common.shape[1]
        effect[chosen], error[chosen] = coefficients[first:], variance[first:].sqrt()
    return BitEffects(effect, error, max(freedom, 0), joint)


def _varying(columns: Tensor) -> Tensor:
    """Columns that are not constant, centred, so that the normal equations stay well conditioned."""
    spread = columns[:, (columns != columns[:1]).any(0)] if len(columns) else columns
    return spread - spread.mean(0)


def _is_estimable(design: Tensor) -> bool:
    """Whether the columns are independent and leave a degree of freedom."""
    rows, columns = design.shape
    return rows > columns and int(torch.linalg.matrix_rank(design)) == columns
