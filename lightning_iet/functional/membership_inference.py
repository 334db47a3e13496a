"""Membership inference: can training images be told from others by their loss?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_number, check_numbers

FALSE_POSITIVE_RATES = (0.01, 0.001)
"""The rates of false positives at which true ones are counted."""


def membership_inference(
    members: Tensor,
    non_members: Tensor,
    *,
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
    confidence: float = 0.95,
) -> dict[str, Tensor]:
    """Attack by the loss: call an image a member of the training set if its loss is at most some threshold.

    (Yeom et al., CSF 2018, arXiv:1709.01604; for diffusion models Carlini et al. 2023, arXiv:2301.13188. The rates of
    true positives at few false positives are what Carlini et al., S&P 2022, arXiv:2112.03570, ask to be reported.)

    Args:
        members: losses of training images, shape ``(M,)``.
        non_members: losses of held-out images, shape ``(N,)``, measured in the same way.
        rates: false positive rates in [0, 1].
        confidence: of the interval of the AUC.

    Returns:
        ``"auc"``, ``"auc_low"``, ``"auc_high"`` and, for each rate, ``"tpr@0.01"`` and the like; 0-d, float64.

    Raises:
        ValueError: if there are no members or no non-members, a loss is NaN, or the shapes are others; as
            :func:`check_settings`. The functions below refuse the same.

    Example:
        >>> found = membership_inference(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.6, 0.7]), rates=(0.01,))
        >>> {name: round(value.item(), 3) for name, value in found.items()}
        {'auc': 0.833, 'auc_low': 0.456, 'auc_high': 1.0, 'tpr@0.01': 0.667}
    """
    check_settings(rates=rates, confidence=confidence)
    low, high = auc_interval(members, non_members, confidence=confidence)
    rates_of = {f"tpr@{rate:g}": tpr_at_fpr(members, non_members, rate) for rate in rates}
    return {"auc": roc_auc(members, non_members), "auc_low": low, "auc_high": high} | rates_of


def check_settings(*, rates: Sequence[float] = FALSE_POSITIVE_RATES, confidence: float = 0.95) -> None:
    """Raise a ValueError for rates outside [0, 1] or of one name, and for a confidence outside (0, 1)."""
    check_numbers("rates", rates, "[0, 1]", f"Leave it out for {FALSE_POSITIVE_RATES}.")
    check_number("confidence", confidence, "(0, 1)", "0.95 is the default.")


def _checked(members: Tensor, non_members: Tensor) -> tuple[Tensor, Tensor]:
    """Return both kinds of losses in float64, in which losses of any two precisions compare."""
    for name, losses in (("members", members), ("non_members", non_members)):
        if losses.ndim != 1 or len(losses) == 0:
            raise ValueError(
                f"Argument `{name}` expected one loss for each image, shape (N,) with N > 0, but got "
                f"{tuple(losses.shape)}. Average over every dimension but the first, and give losses of both kinds."
            )
        if losses.isnan().any():
            raise ValueError(
                f"Argument `{name}` expected numbers, but got NaN for {losses.isnan().sum()} of {len(losses)} images. "
                "Look at those images, and at the model."
            )
    return members.double(), non_members.double()


def roc_auc(members: Tensor, non_members: Tensor) -> Tensor:
    r"""Return the area under the ROC curve: how often a member's loss is below a non-member's, ties counting one half.

    .. math:: \mathrm{AUC} = \frac{1}{MN} \sum_{i,j} \big([l_i < l'_j] + \tfrac12 [l_i = l'_j]\big)

    Counted in integers, hence the same for every order of the losses. (torchmetrics counts in float32, and squeezes
    losses above 1 by a sigmoid, which makes ties.)

    Args:
        members: shape ``(M,)``.
        non_members: shape ``(N,)``.

    Returns:
        0-d tensor in [0, 1], float64; 0.5 is chance.

    Example:
        >>> roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        tensor(0.8750, dtype=torch.float64)
    """
    members, non_members = _checked(members, non_members)
    return _twice_below(members, non_members).sum().double() / (2 * len(members) * len(non_members))


def _twice_below(losses: Tensor, others: Tensor) -> Tensor:
    """For every loss, twice the number of others above it plus the number of ties."""
    ordered = others.sort().values
    not_above = torch.searchsorted(ordered, losses.contiguous(), right=True)
    below = torch.searchsorted(ordered, losses.contiguous())
    return 2 * len(others) - not_above - below


def auc_interval(members: Tensor, non_members: Tensor, *, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return DeLong's confidence interval of the AUC (DeLong, DeLong and Clarke-Pearson, Biometrics 1988).

    .. math:: \mathrm{AUC} \pm z \sqrt{s^2_{10} / M + s^2_{01} / N},

    where :math:`s^2_{10}` is the variance, over members, of the share of non-members above each, and :math:`s^2_{01}`
    the reverse; cut off at 0 and 1. Where both variances are zero, that is with an AUC of 0 or 1, or if all losses are
    equal, the interval is a point. That says nothing about certainty: a few images are enough for it.

    Args:
        members: shape ``(M,)``.
        non_members: shape ``(N,)``.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, 0-d, float64; NaN if there is only one member or non-member.

    Example:
        >>> low, high = auc_interval(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 3.0, 5.0]))
        >>> round(low.item(), 3), round(high.item(), 3)
        (0.235, 1.0)
    """
    check_settings(confidence=confidence)
    members, non_members = _checked(members, non_members)
    scale = 2 * len(members), 2 * len(non_members)
    of_members = _twice_below(members, non_members).double() / scale[1]
    of_others = 1 - _twice_below(non_members, members).double() / scale[0]
    variance = _variance(of_members) / len(members) + _variance(of_others) / len(non_members)
    half = torch.special.ndtri(variance.new_tensor((1 + confidence) / 2)) * variance.sqrt()
    auc = roc_auc(members, non_members)
    return (auc - half).clamp(0, 1), (auc + half).clamp(0, 1)


def _variance(values: Tensor) -> Tensor:
    """Variance with ``N - 1``, NaN for a single value, to the last bit the same for every order."""
    ordered = values.sort().values
    return (ordered - ordered.mean()).square().sum() / (len(ordered) - 1)


def tpr_at_fpr(members: Tensor, non_members: Tensor, rate: float) -> Tensor:
    """Return the largest share of members found at a threshold that calls at most a given share of non-members so.

    With fewer than ``1 / rate`` non-members no false positive is allowed at all.

    Args:
        members: shape ``(M,)``.
        non_members: shape ``(N,)``.
        rate: the false positive rate, in [0, 1].

    Returns:
        0-d tensor in [0, 1], float64.

    Example:
        >>> tpr_at_fpr(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.15, 0.5, 0.8, 1.0]), 0.25)
        tensor(0.6667, dtype=torch.float64)
    """
    check_number("rate", rate, "[0, 1]", "0.01 is customary.")
    members, non_members = _checked(members, non_members)
    allowed = int(rate * len(non_members) + 1e-9)  # 0.29 * 100 is 28.999…
    if allowed >= len(non_members):
        return torch.ones((), dtype=torch.float64, device=members.device)
    first_refused = non_members.sort().values[allowed]
    return (members < first_refused).double().mean()


def roc_curve(members: Tensor, non_members: Tensor) -> tuple[Tensor, Tensor]:
    """Return the false and true positive rates of all thresholds, from none to all called members.

    Args:
        members: shape ``(M,)``.
        non_members: shape ``(N,)``.

    Returns:
        Two ascending tensors of one length, float64.

    Example:
        >>> roc_curve(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        (tensor([0.0000, 0.0000, 0.5000, 1.0000], dtype=torch.float64),
         tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64))
    """
    members, non_members = _checked(members, non_members)
    thresholds = torch.cat([members, non_members]).unique()
    rates = [
        torch.searchsorted(losses.sort().values, thresholds, right=True).double() / len(losses)
        for losses in (non_members, members)
    ]
    return torch.nn.functional.pad(rates[0], (1, 0)), torch.nn.functional.pad(rates[1], (1, 0))
