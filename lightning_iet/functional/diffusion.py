"""The denoising loss, one number per sample."""

from typing import Any, Literal

import torch
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
        >>> sample_losses(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))
        tensor([1., 3.])
    """
    return (prediction - target).square().flatten(1).mean(1)


def mean_loss(sample_loss: Tensor, timesteps: Tensor) -> Tensor:
    """Return the mean, the default reducer, whatever the timesteps.

    Example:
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
        >>> guide(torch.tensor([2.0]), torch.tensor([1.0]), scale=3)
        tensor([4.])
    """
    return unconditional + scale * (conditional - unconditional)


FlowWeighting = Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"]
"""How flow matching draws noise levels, or weights their losses; see `draw_flow_levels` and `flow_weights`."""


def draw_flow_levels(num: int, weighting: FlowWeighting, *, device: Any = None) -> Tensor:
    r"""Draw where in the noise schedule flow matching trains, as shares of the schedule in [0, 1).

    ``"logit_normal"``: :math:`u = \mathrm{sigmoid}(z)`, z standard normal; ``"mode"``:
    :math:`u = 1 - v - 1.29\,(\cos^2(\pi v / 2) - 1 + v)`, v uniform; otherwise u is uniform.

    Source: Esser et al. 2024, *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*, section 3.1,
    https://arxiv.org/abs/2403.03206, with the constants of diffusers' ``train_dreambooth_sd3.py``.

    Args:
        num: How many, B.
        weighting: Which distribution.
        device: Where the numbers are.

    Returns:
        Shape ``(B,)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bool((draw_flow_levels(1000, "logit_normal") - 0.5).abs().mean() < 0.2)
        True
    """
    if weighting == "logit_normal":
        return torch.randn(num, device=device).sigmoid().clamp(max=1 - 2**-24)
    level = torch.rand(num, device=device)
    if weighting == "mode":
        level = 1 - level - 1.29 * ((torch.pi * level / 2).cos().square() - 1 + level)
    return level.clamp(0, 1 - 2**-24)


def flow_weights(sigmas: Tensor, weighting: FlowWeighting) -> Tensor | None:
    r"""Return the weights of flow-matching losses by noise level.

    ``"sigma_sqrt"``: :math:`\sigma^{-2}`; ``"cosmap"``: :math:`2 / (\pi\,(1 - 2\sigma + 2\sigma^2))`; otherwise 1.

    Source: as for :func:`draw_flow_levels`.

    Args:
        sigmas: Noise levels in (0, 1], any shape.
        weighting: Which.

    Returns:
        The weights, of the same shape; ``None`` = all are 1.

    Example:
        >>> flow_weights(torch.tensor([0.5, 1.0]), "sigma_sqrt")
        tensor([4., 1.])
    """
    if weighting == "sigma_sqrt":
        return sigmas**-2
    if weighting == "cosmap":
        return 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
    return None


def edm_coefficients(
    sigmas: Tensor, *, sigma_data: float, prediction_type: PredictionType
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return how EDM scales what a denoiser F sees and says: :math:`D(x) = c_{skip}\,x + c_{out}\,F(c_{in}\,x)`.

    :math:`c_{skip} = \sigma_d^2 / (\sigma^2 + \sigma_d^2)`, :math:`c_{in} = 1 / \sqrt{\sigma^2 + \sigma_d^2}`,
    :math:`c_{out} = \pm\,\sigma\,\sigma_d / \sqrt{\sigma^2 + \sigma_d^2}`, negative for ``"v_prediction"``.

    Source: Karras et al. 2022, *Elucidating the Design Space of Diffusion-Based Generative Models*, table 1,
    https://arxiv.org/abs/2206.00364; the sign is that of ``diffusers.EDMEulerScheduler``.

    Args:
        sigmas: Noise levels, any shape.
        sigma_data: :math:`\sigma_d`, the standard deviation of the data.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.

    Returns:
        ``(c_skip, c_out, c_in)``, each of that shape.

    Example:
        >>> c_skip, c_out, c_in = edm_coefficients(torch.tensor(0.5), sigma_data=0.5, prediction_type="epsilon")
        >>> round(float(c_skip), 3), round(float(c_out), 3), round(float(c_in), 3)
        (0.5, 0.354, 1.414)
    """
    total = sigmas.square() + sigma_data**2
    c_out = sigmas * sigma_data / total.sqrt()
    return sigma_data**2 / total, -c_out if prediction_type == "v_prediction" else c_out, total.rsqrt()
