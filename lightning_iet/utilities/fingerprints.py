"""SHA-256 of data, weights and settings, by which runs and results are told apart."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def sha256_of(parts: Iterable[bytes]) -> str:
    """Hash bytes one after another.

    Args:
        parts: In an order that counts; where one ends does not.
    """
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def digest(*parts: object) -> str:
    """Hash what a result depends on, with the length of each part.

    Args:
        parts: Bytes as they are, anything else by its ``str``.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest("pixels", 50)[:8], digest("pixels5", 0)[:8]  # where a part ends counts
        ('baecf511', '6db77c99')
    """
    contents = (part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape") for part in parts)
    return sha256_of(len(content).to_bytes(8, "little") + content for content in contents)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bits of a tensor of any type (bfloat16 too) on any device."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensor_bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor's elements as integers, in one dimension, on its device.

    Example:
        >>> tensor_bits(torch.tensor([[0.0], [-0.0]]))
        tensor([          0, -2147483648], dtype=torch.int32)
    """
    flat = tensor.detach().contiguous().flatten()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    return flat.view(kinds[flat.element_size()])


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Sum each tensor's bits, read as integers; shape (number of tensors,), on the device of the first."""
    sums: list[Tensor] = []
    for tensor in tensors:
        found = tensor_bits(tensor).sum(dtype=torch.int64)
        sums.append(found.to(sums[0].device) if sums else found)
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def hash_weights(network: nn.Module) -> str:
    """Hash the names and the bits of a network's parameters and buffers.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> hash_weights(network) == hash_weights(network.double())
        False
    """
    state = network.state_dict()
    return digest(*(part for name in sorted(state) for part in (name, tensor_bytes(state[name]))))


def hash_images(images: Tensor) -> str:
    """Hash a set of images by its content at 8 bits a value.

    Args:
        images: Floating point in [0, 1], shape ``(N, C, H, W)``.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> hash_images(torch.zeros(2, 1, 2, 2)) == hash_images(torch.zeros(1, 2, 2, 2))
        False
    """
    content = images.mul(255).round().to(torch.uint8).cpu().numpy()
    return sha256_of((f"{content.shape}".encode(), content.tobytes()))[:16]
