"""Fashion-MNIST's files, with random clothes."""

import gzip

import torch

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(tensor):
    """The bytes of an idx file, written from its description."""
    header = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return header + bytes(map(int, tensor.flatten().tolist()))


def write_fashion(folder, train=60, test=40, *, packed=False):
    """The four files, with random clothes; returns their tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for count in (train, test):
        parts += [torch.randint(256, (count, 28, 28), dtype=torch.uint8), torch.arange(count, dtype=torch.uint8) % 10]
    for name, tensor in zip(NAMES, parts, strict=True):
        content = idx(tensor)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return parts
