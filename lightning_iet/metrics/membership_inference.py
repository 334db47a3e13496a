"""Membership inference: can training images be told from others by their loss?"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from lightning_iet.functional.membership_inference import (
    FALSE_POSITIVE_RATES,
    check_settings,
    membership_inference,
    roc_curve,
)
from lightning_iet.metrics.base import TwoKindsMetric, Values, joined


class MembershipInference(TwoKindsMetric):
    r"""How well an attacker who sees the loss of an image can tell whether the image was trained on.

    .. math::
        \mathrm{AUC} = \frac{1}{MN} \sum_{i,j} \big([l_i < l'_j] + \tfrac12 [l_i = l'_j]\big)

    over the losses :math:`l_i` of training images and :math:`l'_j` of held-out images, with DeLong's 95 % interval, and
    the true positive rates at 1 % and 0.1 % false positives (attack: Yeom et al., CSF 2018, arXiv:1709.01604; rates:
    Carlini et al., S&P 2022, arXiv:2112.03570; on diffusion models: Carlini et al. 2023, arXiv:2301.13188).

    Measure both kinds of loss in the same way: the same timesteps, and as many draws of noise. Held-out images must
    come from where the training images come from; a data set that merely looks alike gives an AUC far from 0.5 for a
    model that has memorised nothing. A weak attack that fails does not prove that a strong one would.

    Input of ``update``:

    - ``losses``: one for each image, shape ``(B,)``; kept in float32.
    - ``member``: whether these are training images.

    ``forward`` does what ``update`` does, and returns nothing.

    Output of ``compute``, 0-d tensors, float64:

    - ``"auc"``, with its interval ``"auc_low"`` and ``"auc_high"``; 0.5 is chance.
    - ``"tpr@0.01"``, ``"tpr@0.001"``: in [0, 1]; chance is the rate itself. Fewer than ``1 / rate`` held-out images
      allow no false positive.

    Args:
        rates: false positive rates in [0, 1].
        confidence: of the interval, in (0, 1).
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a rate or the confidence is out of range, or two rates are equal; in ``update``, if ``losses``
            are of another shape; in ``compute``, if a loss is NaN, or there are none of one kind.

    Example:
        >>> metric = MembershipInference(rates=(0.01,))
        >>> metric.update(torch.tensor([0.1, 0.2, 0.6]), member=True)
        >>> metric.update(torch.tensor([0.5, 0.6, 0.7]), member=False)
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'auc': 0.833, 'auc_low': 0.456, 'auc_high': 1.0, 'tpr@0.01': 0.667}
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    settings = ("rates", "confidence")
    plot_upper_bound = 1.0
    members: list[Tensor]
    non_members: list[Tensor]

    def __init__(
        self, *, rates: Sequence[float] = FALSE_POSITIVE_RATES, confidence: float = 0.95, **kwargs: Any
    ) -> None:
        check_settings(rates=rates, confidence=confidence)
        super().__init__(**kwargs)
        self.rates, self.confidence = tuple(rates), confidence
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("non_members", [], dist_reduce_fx="cat")

    def update(self, losses: Tensor, member: bool) -> None:
        """Take in the losses of more images, shape ``(B,)``, all of them members or none."""
        if losses.ndim != 1:
            raise ValueError(
                f"Argument `losses` expected one loss for each image, shape (B,), but got {tuple(losses.shape)}. "
                "Average over every dimension but the first."
            )
        (self.members if member else self.non_members).append(losses.detach().to(self.device, torch.float32))

    def compute(self) -> dict[str, Tensor]:
        """Return the measures over all updates and processes."""
        return membership_inference(*self._losses(), rates=self.rates, confidence=self.confidence)

    def _losses(self) -> tuple[Tensor, Tensor]:
        return joined(self.members, device=self.device), joined(self.non_members, device=self.device)

    def plot(self, val: Values | None = None, ax: Axes | None = None) -> tuple[FigureBase, Axes]:
        """Draw results as points or curves; by default the ROC curve of this process's losses.

        Its axes are logarithmic, since few false positives are what counts.

        Args:
            val: a result of ``compute``, or several of them.
            ax: where to draw; by default in a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: if the curve is asked for and there are no losses of one kind.

        Example:
            >>> metric = MembershipInference()
            >>> metric.update(torch.rand(100), member=True)
            >>> metric.update(torch.rand(100), member=False)
            >>> metric.plot()[1].get_xlabel()
            'false positive rate'
        """
        if val is not None:
            return super().plot(val, ax)
        false_positives, true_positives = (rates.cpu() for rates in roc_curve(*self._losses()))
        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(false_positives, true_positives)
        ax.plot([1e-4, 1], [1e-4, 1], linestyle=":", color="grey")
        ax.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1.05))
        ax.set(xlabel="false positive rate", ylabel="true positive rate", title=type(self).__name__)
        ax.grid(visible=True)
        return ax.figure, ax
