"""The denoising loss, one number per sample."""

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""What the denoiser predicts; see `prediction_target`."""


def prediction_target(
    images: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    r"""Return what the denoiser is trained to predict.

    ``"epsilon"``: the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239); ``"sample"``: the image;
    ``"v_prediction"``: :math:`v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\,x_0`
    (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512).

    Args:
        images: Clean images in [-1, 1], shape ``(B, ...)``.
        noise: Gaussian noise of the same shape.
        timesteps: Integers 0 … T - 1, shape ``(B,)``.
        alphas_cumprod: :math:`\bar\alpha_t`, shape ``(T,)``.
        prediction_type: Which of the three.

    Returns:
        The target, shape ``(B, ...)``.

    Raises:
        ValueError: For another prediction type.

    Example:
        >>> import torch
        >>> x, noise, t = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0])
        >>> prediction_target(x, noise, t, torch.tensor([0.25]), "v_prediction")
        tensor([[0.5000]])
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    if prediction_type == "v_prediction":
        alpha = alphas_cumprod.to(images)[timesteps].view(-1, *[1] * (images.ndim - 1))
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * images
    raise ValueError(
        f"Argument `prediction_type` expected 'epsilon', 'sample' or 'v_prediction', but got {prediction_type!r}."
    )


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample: ``l_i``, the mean over all but the first dimension.

    Args:
        prediction: Shape ``(B, ...)``.
        target: The same shape.

    Returns:
        Losses ≥ 0, shape ``(B,)``.

    Example:
        >>> import torch
        >>> sample_losses(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))
        tensor([1., 3.])
    """
    return (prediction - target).square().flatten(1).mean(1)


def mean_loss(sample_loss: Tensor, timesteps: Tensor) -> Tensor:
    """Return the mean, the default reducer, whatever the timesteps.

    Example:
        >>> import torch
        >>> mean_loss(torch.tensor([1.0, 3.0]), torch.tensor([5, 7]))
        tensor(2.)
    """
    return sample_loss.mean()


def guide(conditional: Tensor, unconditional: Tensor, *, scale: float) -> Tensor:
    r"""Guide a prediction without a classifier: :math:`f_\varnothing + s\,(f_c - f_\varnothing)`.

    Source: Ho & Salimans, *Classifier-Free Diffusion Guidance*, 2022, https://arxiv.org/abs/2207.12598; s is their
    1 + w, as in diffusers.

    Args:
        conditional: Prediction with the condition, any shape.
        unconditional: Prediction with the null condition, the same shape.
        scale: s; 0 = unconditional, 1 = conditional, more = guided.

    Returns:
        The guided prediction, the same shape.

    Example:
        >>> import torch
        >>> guide(torch.tensor([2.0]), torch.tensor([1.0]), scale=3)
        tensor([4.])
    """
    return unconditional + scale * (conditional - unconditional)
