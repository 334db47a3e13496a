"""SV-DIFF: train shifts of the singular values of weights."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_iet.functional.parameter_groups import is_norm, is_svdiff_layer
from lightning_iet.utilities.files import write_atomically
from lightning_iet.utilities.fingerprints import sha256_of, tensor_bits, tensor_bytes


class SpectralBasis:
    r"""Thin singular value decomposition of a weight, :math:`W = U\,\mathrm{diag}(S)\,V^\top`.

    It is neither parameter nor buffer: checkpoints, shards, DDP and averages of the weights do not see it, copies of
    the layer share it, and it stays in float32 when the layer is cast to another type.

    Args:
        weight: Matrix, shape ``(m, n)``, r = min(m, n).
        folder: Where decompositions are kept on disk, by a fingerprint of the weight; None = they are not.

    Raises:
        ValueError: If the weight holds NaN or infinity.

    Example:
        >>> u, s, vh = SpectralBasis(torch.tensor([[0.0, 2.0, 0.0]])).on("cpu")
        >>> s, (u * s) @ vh
        (tensor([2.]), tensor([[0., 2., 0.]]))
    """

    def __init__(self, weight: Tensor, folder: Path | None = None) -> None:
        self.dtype = weight.dtype
        self.checksum = checksum(weight)
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {weight.device: _decompose(weight, folder)}

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        r""":math:`U`, shape ``(m, r)``, :math:`S`, ``(r,)``, and :math:`V^\top`, ``(r, n)``, on a device."""
        device = torch.device(device)
        if device not in self._tensors:
            u, s, vh = next(iter(self._tensors.values()))
            self._tensors[device] = u.to(device), s.to(device), vh.to(device)
        return self._tensors[device]

    def fits(self, weight: Tensor) -> bool:
        """Whether it is the decomposition of a weight, up to the rounding of the weight's type if that is another.

        The weight may have any shape with as many elements; this waits for the device.
        """
        if weight.dtype == self.dtype and checksum(weight) == self.checksum:
            return True
        types = (torch.bfloat16, torch.float16)  # also of a weight that was read from such a checkpoint
        rounded = next((t for t in types if torch.equal(weight.to(t).to(weight.dtype), weight)), None)
        if rounded is None:
            return False
        u, s, vh = self.on(weight.device)
        matrix = weight.detach().reshape(len(u), -1).to(vh.dtype)
        largest = matrix.abs().max()
        error = ((u * s) @ vh - matrix).abs()
        return bool((error <= torch.finfo(rounded).eps * matrix.abs() + 1e-5 * largest).all())

    def move(self, device: torch.device) -> None:
        """Keep the decomposition on one device only."""
        self._tensors = {device: self.on(device)}

    @property
    def nbytes(self) -> int:
        """Bytes on each device."""
        return sum(tensor.nbytes for tensor in next(iter(self._tensors.values())))

    @property
    def flops(self) -> int:
        """Floating-point operations that form the weight once, 2 m r n."""
        u, s, vh = next(iter(self._tensors.values()))
        return 2 * u.shape[0] * len(s) * vh.shape[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpectralBasis":
        return self


class SpectralShift(nn.Module):
    r"""A parametrization, :math:`W'(\delta) = W + U\,\mathrm{diag}(\mathrm{relu}(S + \delta) - S)\,V^\top`.

    :math:`\delta = 0`, where training starts, gives W bit for bit; the product :math:`U\,\mathrm{diag}(S)\,V^\top` of
    the published code does not. The matrix is formed in float32 (float64 for a float64 weight), under autocast too.

    Source: Han et al., *SVDiff: Compact Parameter Space for Diffusion Fine-Tuning*, ICCV 2023,
    https://arxiv.org/abs/2303.11305.

    Args:
        weight: Of any shape ``(m, …)``; it is decomposed as a matrix ``(m, n)``.
        as_vector: Whether it is decomposed as one row ``(1, n)``: weights of normalisation layers.
        folder: See :class:`SpectralBasis`.

    Attributes:
        shift: :math:`\delta`, shape ``(r,)``, the only parameter.
        basis: The decomposition.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> spectral = SpectralShift(weight)
        >>> torch.equal(spectral(weight), weight)
        True
        >>> _ = spectral.shift.data.copy_(torch.tensor([1.0, -2.0]))
        >>> spectral(weight).detach().abs()
        tensor([[4., 0.],
                [0., 0.]])
    """

    def __init__(self, weight: Tensor, *, as_vector: bool = False, folder: Path | None = None) -> None:
        super().__init__()
        self.as_vector = as_vector
        self.folder = folder
        self.basis = SpectralBasis(self._matrix(weight.detach()), folder)
        size = len(self.basis.on(weight.device)[1])
        self.shift = nn.Parameter(torch.zeros(size, dtype=_float_type(weight), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return W'(δ), of the weight's shape and type."""
        with torch.autocast(weight.device.type, enabled=False):
            u, s, vh = self.basis.on(weight.device)
            change = torch.relu(s + self.shift) - s
            shifted = torch.addmm(self._matrix(weight).to(vh.dtype), u * change, vh)
        shifted = shifted.reshape(weight.shape).to(weight.dtype)
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            shifted = shifted.contiguous(memory_format=torch.channels_last)
        return shifted

    def rebuild(self, weight: Tensor) -> bool:
        """Decompose again if the weight is another one than the basis was made from; return whether it is."""
        if self.basis.fits(weight):
            return False
        self.basis = SpectralBasis(self._matrix(weight.detach()), self.folder)
        return True

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, -1) if self.as_vector else weight.reshape(len(weight), -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpectralShift":
        before = self.shift.device
        super()._apply(fn, recurse)
        if self.shift.device != before:
            self.basis.move(self.shift.device)
        return self


def add_svdiff(network: nn.Module, layers: Iterable[str], *, folder: Path | str | None = None) -> None:
    """Put spectral shifts into layers, and freeze their weights.

    Args:
        network: Any network, before ``torch.compile``.
        layers: Names of linear, convolution, embedding and normalisation layers.
        folder: Where singular value decompositions are kept on disk, so that the next run of the same pretrained
            network reads them; made if it is not there. None = they are made anew.

    Raises:
        ValueError: For a layer of another kind, one whose weight is parametrized already, quantised, shared with
            another layer or not finite.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 2))
        >>> add_svdiff(network, ["0"])
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['0.bias', '0.parametrizations.weight.0.shift']
    """
    found: dict[str, Any] = {name: network.get_submodule(name) for name in layers}
    users: dict[int, list[str]] = {}
    for name, layer in network.named_modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    for name, layer in found.items():
        _check_layer(name, layer, users)
    folder = None if folder is None else Path(folder)
    shifts: dict[str, SpectralShift] = {}
    for name, layer in found.items():
        try:
            shifts[name] = SpectralShift(layer.weight, as_vector=is_norm(layer), folder=folder)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from None
    for name, layer in found.items():
        parametrize.register_parametrization(layer, "weight", shifts[name], unsafe=True)
        layer.parametrizations.weight.original.requires_grad_(False)
        layer.register_load_state_dict_post_hook(_rebuild)


def spectral_shifts(network: nn.Module) -> dict[str, SpectralShift]:
    """The spectral shifts in a network, by the name of the layer."""
    return {name: layer.parametrizations.weight[0] for name, layer in network.named_modules() if _has_shift(layer)}


def fold_svdiff(network: nn.Module) -> None:
    """Replace each weight by W'(δ), in place: afterwards the network is an ordinary one.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> before = network[0].weight.abs().item()
        >>> add_svdiff(network, ["0"])
        >>> _ = network[0].parametrizations.weight[0].shift.data.fill_(2.0)
        >>> fold_svdiff(network)
        >>> round(network[0].weight.abs().item() - before, 5), list(network.state_dict())
        (2.0, ['0.weight'])
    """
    _remove(network, folded=True)


def remove_svdiff(network: nn.Module) -> None:
    """Take the spectral shifts out again: the weights are those of before."""
    _remove(network, folded=False)


def rebuild_bases(network: nn.Module) -> list[str]:
    """Decompose again where a weight has been replaced since, by a broadcast or by hand; return these layers' names."""
    return [
        name
        for name, layer in network.named_modules()
        if _has_shift(layer) and layer.parametrizations.weight[0].rebuild(layer.parametrizations.weight.original)
    ]


def _rebuild(layer: Any, incompatible_keys: Any) -> None:
    """Decompose the weight that a state dict has brought, unless it is the one of before."""
    if _has_shift(layer):
        layer.parametrizations.weight[0].rebuild(layer.parametrizations.weight.original)


def share_bases(network: nn.Module, copy: nn.Module) -> None:
    """Let a copy of a network with the same weights use the same decompositions, not ones of its own."""
    own = spectral_shifts(network)
    for name, shift in spectral_shifts(copy).items():
        if own[name].basis.checksum == shift.basis.checksum:
            shift.basis = own[name].basis


def checksum(weight: Tensor) -> tuple[int, int, int]:
    """Size of a weight, and two sums of its bits, one of them weighted by position; it waits for the device."""
    if weight.is_meta:
        return weight.numel(), 0, 0
    bits = tensor_bits(weight).long()
    positions = torch.arange(1, len(bits) + 1, device=bits.device)
    return weight.numel(), int(bits.sum()), int((bits * positions).sum())


_OF_A_CLASS = ("__dict__", "__weakref__")


def _remove(network: nn.Module, *, folded: bool) -> None:
    adapted: list[Any] = [layer for layer in network.modules() if _has_shift(layer)]
    for layer in adapted:
        is_trained = layer.parametrizations.weight.original.requires_grad
        # Torch takes the weight from the layer's class, which a deep copy of the network shares with its original.
        kind = type(layer)
        layer.__class__ = type(
            kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in _OF_A_CLASS}
        )
        with torch.no_grad():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=folded)
        layer.weight.requires_grad_(is_trained)
        # As layers are made: the weight comes first, also in the order of parameters and state dicts.
        weight = layer._parameters.pop("weight")
        layer._parameters = {"weight": weight, **layer._parameters}
        hooks = layer._load_state_dict_post_hooks
        for number in [number for number, hook in hooks.items() if hook is _rebuild]:
            del hooks[number]


def _has_shift(layer: Any) -> bool:
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], SpectralShift)


def _check_layer(name: str, layer: nn.Module, users: dict[int, list[str]]) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"SV-DIFF expected a plain weight in '{name}', but got one that is parametrized already. Remove that "
            "parametrization (torch.nn.utils.parametrize.remove_parametrizations) first."
        )
    if not is_svdiff_layer(layer):
        raise ValueError(
            f"SV-DIFF expected a linear, convolution, embedding or normalisation layer in '{name}', but got "
            f"{type(layer).__name__}. Leave it out."
        )
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"SV-DIFF expected a weight of floating-point numbers in '{name}', but got {weight.dtype}: quantised "
            "weights have no singular values to train. Load the network in float32, bfloat16 or float16."
        )
    if len(users[id(weight)]) > 1:
        raise ValueError(
            f"SV-DIFF expected a weight of its own in '{name}', but got one that "
            f"{' and '.join(repr(user) for user in users[id(weight)])} share. Leave it out, or untie them."
        )


def _float_type(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _decompose(weight: Tensor, folder: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.detach().to(_float_type(weight))
    file = None
    if folder is not None and not weight.is_meta:
        name = sha256_of((f"{tuple(matrix.shape)} {matrix.dtype}".encode(), tensor_bytes(matrix)))
        file = folder / f"{name}.safetensors"
    if file is not None and file.is_file():
        try:
            kept = load_file(file)
        except Exception as error:  # safetensors raises errors of its own on a damaged file
            raise ValueError(f"SV-DIFF expected a decomposition in '{file}', but got {error}. Delete it.") from error
        return tuple(kept[name].to(weight.device) for name in ("u", "s", "vh"))
    if not weight.is_meta and not torch.isfinite(matrix).all():
        raise ValueError("SV-DIFF expected a weight of finite numbers, but got NaN or infinity.")
    if len(matrix) == 1:  # a row is its own decomposition
        s = torch.linalg.vector_norm(matrix, dim=1)
        vh = torch.where(s > 0, matrix / s.clamp(min=torch.finfo(s.dtype).tiny), matrix.shape[1] ** -0.5)
        u = torch.ones_like(matrix[:, :1])
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, vh = u.contiguous(), vh.contiguous()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as unfinished:  # other processes may be about to read it
            save_file({"u": u.cpu(), "s": s.cpu(), "vh": vh.cpu()}, unfinished)
    return u, s, vh
