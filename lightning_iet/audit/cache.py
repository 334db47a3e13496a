"""What an audit has worked out so far, on disk: an interrupted audit goes on from there, and processes share it."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lightning_iet.tools.run_folder import write_atomically

__all__ = ["BlockCache", "digest", "hash_weights"]

FORMAT = "2"  # to be raised when stored blocks change their meaning
_OURS = re.compile(r"\.?[0-9a-f]{64}(\.\d+)?\.safetensors")  # blocks, and those that were never finished
_SEAL = hashlib.sha256().digest_size


def digest(*parts: object) -> str:
    """Hash of what a result depends on.

    Args:
        parts: bytes as they are, anything else by its ``str``.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest("pixels", 50)[:8], digest("pixels5", 0)[:8]  # where a part ends counts
        ('baecf511', '6db77c99')
    """
    sha256 = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        sha256.update(len(data).to_bytes(8, "little") + data)
    return sha256.hexdigest()


def hash_weights(network: nn.Module) -> str:
    """Hash the names and the bits of a network's parameters and buffers.

    Args:
        network: on any device.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> hash_weights(network) == hash_weights(network.double())
        False
    """
    state = network.state_dict()
    return digest(*(part for name in sorted(state) for part in (name, _bits(state[name]))))


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class BlockCache:
    """Tensors in a folder, each file under the hash of all that it was computed from.

    A file is written whole or not at all, with a hash of its content behind it. One that cannot be read, or whose bits
    have changed, counts as missing, so that it is computed again.

    Args:
        folder: made when the first block is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return self.load(key) is not None

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under a key, or ``None``."""
        try:
            stored = self._path(key).read_bytes()
            if hashlib.sha256(memoryview(stored)[:-_SEAL]).digest() != stored[-_SEAL:]:
                return None
            return load(stored[:-_SEAL])
        except (FileNotFoundError, SafetensorError):
            return None

    def require(self, key: str) -> dict[str, Tensor]:
        """Return the tensors that some process has stored under a key.

        Raises:
            ValueError: if they are not there.
        """
        stored = self.load(key)
        if stored is None:
            raise ValueError(
                f"Argument `cache` expected a folder that all processes see and nobody empties, but got "
                f"'{self.folder}', where a block is missing. Give one on a shared disk with --cache."
            )
        return stored

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path(key)) as unfinished:
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            unfinished.write_bytes(content + hashlib.sha256(content).digest())

    def clear(self) -> None:
        """Remove the blocks, and the folder if nothing else is in it."""
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            if _OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest(FORMAT, key)}.safetensors"
