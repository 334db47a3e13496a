"""What frozen encoders have made of training samples, so that they need not make it again."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_iet.tools.run_folder import write_atomically

__all__ = ["EncodingCache", "fingerprint"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncodingCache:
    """Tensors by the content that they were made of, in memory or on disk.

    A key is the SHA-256 of the content, its shape, and the weights that encode it: another image, size or encoder is
    another entry. No entry is ever stale, and several runs can share a folder.

    Args:
        place: ``"memory"``, or a folder. On disk, entries are files of their own, which appear whole.
        encoder: What encodes; it must not be trained.

    Attributes:
        num_written: Entries that this object has made.

    Example:
        >>> cache = EncodingCache("memory", nn.Linear(2, 2))
        >>> keys = cache.keys(["a dog", "a cat"])
        >>> cache.put(keys, [torch.tensor([1.0, 2.0])])
        >>> cache.get(keys[1:])
        [tensor([2.])]
        >>> cache.get(cache.keys(["a cat", "a bird"])) is None
        True
    """

    def __init__(self, place: str | Path, encoder: nn.Module) -> None:
        self.num_written = 0
        self._folder = None if place == "memory" else Path(place)
        self._encoder = encoder
        self._entries: dict[str, tuple[Tensor, ...]] = {}

    @cached_property
    def _identity(self) -> bytes:
        # Only when it is needed: weights may be cast to another precision before training.
        return fingerprint(dict(self._encoder.named_parameters())).encode()

    def keys(self, contents: Sequence[str] | Tensor) -> list[str]:
        """Keys of captions, or of images ``(B, ...)`` on the CPU."""
        if isinstance(contents, Tensor):
            shape, rows = str(contents.shape[1:]).encode(), list(contents.contiguous().numpy())
        else:
            shape, rows = b"text", [caption.encode() for caption in contents]
        hashes = [hashlib.sha256(self._identity + shape) for _ in rows]
        for key, row in zip(hashes, rows, strict=True):
            key.update(row)
        return [key.hexdigest() for key in hashes]

    def get(self, keys: Sequence[str]) -> list[Tensor] | None:
        """Encodings of a batch, stacked, or None if one is missing."""
        rows = [row for row in map(self._read, keys) if row is not None]
        if len(rows) < len(keys):
            return None
        return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]

    def put(self, keys: Sequence[str], encodings: Sequence[Tensor]) -> None:
        """Keep the encodings of a batch, each of shape ``(B, ...)``."""
        on_host = [tensor.detach().cpu() for tensor in encodings]
        for number, key in enumerate(keys):
            self._write(key, tuple(tensor[number].clone(memory_format=torch.contiguous_format) for tensor in on_host))

    def _path(self, key: str) -> Path:
        assert self._folder is not None  # noqa: S101 (asked for on disk only)
        return self._folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> tuple[Tensor, ...] | None:
        if self._folder is None:
            return self._entries.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        return tuple(tensor for _, tensor in sorted(load_file(path).items()))

    def _write(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        self.num_written += 1
        if self._folder is None:
            self._entries[key] = tensors
            return
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path(key)) as unfinished:
            save_file({str(number): tensor for number, tensor in enumerate(tensors)}, unfinished)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short name for weights: of their names, shapes and values (the sum of each tensor's bits).

    Args:
        tensors: By name.

    Example:
        >>> fingerprint({"weight": torch.zeros(2)}) == fingerprint({"weight": torch.zeros(2) + 1e-30})
        False
    """
    sums = [(name, tuple(tensor.shape), int(_bits(tensor).sum(dtype=torch.int64))) for name, tensor in tensors.items()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
