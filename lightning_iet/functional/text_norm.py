"""How much a caption changes a denoiser's prediction: large where the caption has been memorized."""

from torch import Tensor


def text_norm(conditional: Tensor, unconditional: Tensor) -> Tensor:
    r"""Return the size of the text-conditional part of each prediction.

    .. math:: \lVert \epsilon(x_t, c) - \epsilon(x_t, \varnothing) \rVert_2 / \sqrt d

    Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*,
    https://openreview.net/forum?id=84n3UwkH7b, and the measure of memorization inside MemControl's search. *(our
    choice: divided by the square root of the dimension d, so that sizes of images compare)*

    Args:
        conditional: Predictions with captions, shape ``(B, ...)``.
        unconditional: Predictions of the same noisy images with the empty caption, of the same shape.

    Returns:
        Shape ``(B,)``, ≥ 0, float32 at least.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> text_norm(torch.ones(2, 4, 8, 8), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 4, 8, 8))
        tensor([0., 2.])
    """
    if conditional.shape != unconditional.shape or conditional.ndim < 2:
        raise ValueError(
            f"Arguments `conditional` and `unconditional` expected one shape (B, ...), but got "
            f"{tuple(conditional.shape)} and {tuple(unconditional.shape)}."
        )
    difference = (conditional - unconditional).flatten(1)
    difference = difference if difference.element_size() > 4 else difference.float()
    return difference.square().mean(1).sqrt()
