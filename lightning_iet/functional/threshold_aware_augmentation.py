r"""Threshold-aware augmentation (TAA): augment the samples whose loss lies just above the threshold of AGC.

With the loss bank :math:`b_t` and the threshold :math:`\lambda` of anti-gradient control, a sample is skipped if
:math:`\rho = l / (\lambda b_t) < 1`. One that is only just kept is about to be memorised; it is augmented, the more
strongly the closer it is.

Source: Guan, Wu, Huang, Liu, Miao, Yang, *Redistribute Ensemble Training for Mitigating Memorization in Diffusion
Models*, https://arxiv.org/abs/2502.09434, and the authors' code (github.com/liuxiao-guan/DCR_X): sharpness 5, a band up
to 1.5, RandAugment with two operations, magnitude at most 5 of 30.

None of these functions waits for the device or loops over samples.
"""

import torch
from torch import Tensor

from lightning_iet.functional.anti_gradient import check_batch


def augmentation_strength(
    losses: Tensor, timesteps: Tensor, bank: Tensor, threshold: float, *, sharpness: float = 5.0, band: float = 1.5
) -> Tensor:
    r"""Compute how strongly to augment each sample: :math:`a = e^{-\beta (\rho - 1)}` where :math:`1 \le \rho <` band.

    It is 1 for a sample whose loss lies on the threshold, and falls as the loss rises above it. Samples that are
    skipped (:math:`\rho < 1`), and those far above the threshold, are not augmented: 0. Nor are samples at a timestep
    whose bank is still empty, and those whose loss is NaN or infinite.

    Args:
        losses: One loss per sample, shape (B,), floating point; compared in the type of ``bank``. No gradient is taken.
        timesteps: The timestep of each sample, shape (B,), integers in [0, T).
        bank: Running mean of the loss by timestep, shape (T,), see
            :func:`~lightning_iet.functional.anti_gradient.update_bank`.
        threshold: :math:`\lambda` of AGC, in (0, 1].
        sharpness: :math:`\beta > 0`; 5 was published.
        band: Largest :math:`\rho > 1`; 1.5 was published, infinity augments every sample that is kept.

    Returns:
        Shape (B,), in the type of ``bank``, in [0, 1].

    Raises:
        ValueError: If the shapes disagree, ``sharpness`` is not positive or ``band`` not above 1.
        TypeError: If ``losses`` is not floating point, or ``timesteps`` are not integers.

    Example:
        >>> bank = torch.tensor([1.0])
        >>> losses = torch.tensor([0.79, 0.80, 0.88, 1.19, 1.20])
        >>> augmentation_strength(losses, torch.zeros(5, dtype=torch.long), bank, threshold=0.8)
        tensor([0.0000, 1.0000, 0.6065, 0.0874, 0.0000])
    """
    check_batch(losses, timesteps)
    check_augmentation(sharpness=sharpness, band=band)
    losses = losses.detach().to(bank.dtype)
    limits = threshold * bank.index_select(0, timesteps.long())  # as keep_mask compares: ρ = 1 is kept
    ratios = losses / limits
    augmented = (losses >= limits) & (ratios < band) & (limits > 0) & losses.isfinite()
    return torch.where(augmented, torch.exp(-sharpness * (ratios - 1)), 0)


def augmentation_magnitude(strength: Tensor, max_magnitude: int = 5) -> Tensor:
    r"""Turn strengths into magnitudes of RandAugment: :math:`M = \lfloor M_\max \, a \rfloor`, of 30.

    One magnitude per sample *(our choice; published: one for a gathered batch, from its mean strength)*. A sample with
    magnitude 0 is to be left alone *(our choice: RandAugment of magnitude 0 still changes some images, since three of
    its operations have no magnitude)*.

    Args:
        strength: From :func:`augmentation_strength`, any shape, in [0, 1].
        max_magnitude: :math:`M_\max` in 0 … 30; 5 was published.

    Returns:
        Integers (uint8) of the shape of ``strength``.

    Raises:
        ValueError: If ``max_magnitude`` is out of range.

    Example:
        >>> augmentation_magnitude(torch.tensor([0.0, 0.19, 0.2, 0.6065, 1.0]))
        tensor([0, 0, 1, 3, 5], dtype=torch.uint8)
    """
    check_augmentation(max_magnitude=max_magnitude)
    return (max_magnitude * strength).floor().to(torch.uint8)


def check_augmentation(*, max_magnitude: int = 5, band: float = 1.5, sharpness: float = 5.0, num_ops: int = 2) -> None:
    """Refuse settings that are out of range.

    Raises:
        ValueError: Naming the argument, and what was published.
    """
    if not 0 <= max_magnitude <= 30:
        raise ValueError(
            f"Argument `max_magnitude` expected an integer in 0 … 30, but got {max_magnitude}. 5 was published, 0 is"
            " off."
        )
    if not band > 1:
        raise ValueError(f"Argument `band` expected a number above 1, but got {band}. 1.5 was published.")
    if not sharpness > 0:
        raise ValueError(f"Argument `sharpness` expected a number above 0, but got {sharpness}. 5 was published.")
    if num_ops < 1:
        raise ValueError(f"Argument `num_ops` expected an integer ≥ 1, but got {num_ops}. 2 was published.")
