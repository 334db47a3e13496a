"""DiffFit: train scales of the outputs of attention and feed-forward layers, beside biases and norms."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_iet.functional.parameter_groups import DIFFFIT_BRANCH_OFFSET, DIFFFIT_OFFSET

_NAMES = (DIFFFIT_OFFSET, DIFFFIT_BRANCH_OFFSET)


def add_difffit(network: nn.Module, parameters: Iterable[str]) -> None:
    r"""Multiply the outputs of layers by :math:`\gamma = 1 + g`, where g = 0 at the start.

    The trained parameter is g, not γ *(our choice: weight decay then pulls to the pretrained network; published: γ,
    which it pulls to 0)*. Where a layer has two scales, as in the published code, both multiply its output. At g = 0
    outputs are those of before, bit for bit. Scales are forward hooks: weights and their names stay as they are.

    Source: Xie et al., *DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
    Fine-Tuning*, ICCV 2023, https://arxiv.org/abs/2304.06648.

    Args:
        network: Any network, before ``torch.compile``.
        parameters: Names of the scales to be: that of a layer with a weight, a dot, and ``difffit_offset`` or
            ``difffit_branch_offset``.

    Raises:
        ValueError: For other names, or a layer that has the scale already.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2))
        >>> add_difffit(network, ["0.difffit_offset"])
        >>> before = network(torch.ones(1, 1))
        >>> _ = network[0].difffit_offset.data.fill_(1.0)
        >>> torch.equal(network(torch.ones(1, 1)), 2 * before)
        True
    """
    for parameter in parameters:
        path, _, name = parameter.rpartition(".")
        layer = network.get_submodule(path)
        weight = getattr(layer, "weight", None)
        if name not in _NAMES or weight is None or name in layer._parameters:
            raise ValueError(
                f"DiffFit expected the name of a layer with a weight and without this scale, then one of "
                f"{', '.join(_NAMES)}, but got '{parameter}'."
            )
        if not _offsets(layer):
            layer.register_forward_hook(_scale)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        layer.register_parameter(name, nn.Parameter(torch.zeros(len(weight), dtype=dtype, device=weight.device)))


@torch.no_grad()
def fold_difffit(network: nn.Module) -> None:
    """Multiply rows of weights, and biases, by the scales, and take these out: an ordinary network again.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2))
        >>> add_difffit(network, ["0.difffit_offset"])
        >>> _ = network[0].difffit_offset.data.fill_(1.0)
        >>> scaled = network(torch.ones(1, 1))
        >>> fold_difffit(network)
        >>> torch.equal(network(torch.ones(1, 1)), scaled), list(network.state_dict())
        (True, ['0.weight', '0.bias'])
    """
    layers: list[Any] = list(network.modules())
    for layer in layers:
        for offset in _offsets(layer):
            scale = 1 + offset
            layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(scale)
    remove_difffit(network)


def remove_difffit(network: nn.Module) -> None:
    """Take the scales out; biases and norms that were trained beside them stay as they are now."""
    for layer in network.modules():
        if _offsets(layer):
            for name in _NAMES:
                layer._parameters.pop(name, None)
            hooks = layer._forward_hooks
            for number in [number for number, hook in hooks.items() if hook is _scale]:
                del hooks[number]


def _offsets(layer: nn.Module) -> list[Tensor]:
    return [offset for name in _NAMES if (offset := layer._parameters.get(name)) is not None]


def _scale(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    behind_channels = output.ndim - 2 if isinstance(layer, nn.modules.conv._ConvNd) else 0
    for offset in _offsets(layer):
        output = output * (1 + offset).to(output.dtype).reshape(-1, *[1] * behind_channels)
    return output
