"""Seeds and states of random generators, saved and restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import numpy as np
import torch


def seed_rng(seed: int, *, devices: bool = True) -> None:
    """Seed Python, NumPy and torch from one number, without a word.

    Unlike ``lightning.seed_everything`` this leaves the environment alone: it is called for every shard of every epoch.

    Args:
        seed: Any integer ≥ 0.
        devices: Whether accelerators' generators are seeded too. Without them it takes microseconds, and is called
            for every sample.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (data sets of users draw from the global generator)
    if devices and _has_cuda():
        torch.manual_seed(seed)
    else:
        # `manual_seed` keeps a stack trace for an accelerator that may yet come: hundreds of microseconds.
        torch.default_generator.manual_seed(seed)


@cache
def _has_cuda() -> bool:
    """Whether this machine has a device; torch looks for the driver's library at each question."""
    return torch.cuda.is_available()


def get_rng_state() -> dict[str, Any]:
    """State of all generators, of plain types that ``torch.load(weights_only=True)`` reads back."""
    name, keys, position, has_gauss, gauss = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(keys.copy()), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_rng_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block without touching the random streams outside of it, seeded when a seed is given.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated_rng(seed=1):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    state = get_rng_state()
    if seed is not None:
        seed_rng(seed)
    try:
        yield
    finally:
        set_rng_state(state)
