"""What any sampler yields in an epoch, as a function of the seed and the epoch alone."""

import random
from collections.abc import Iterable
from itertools import chain, islice
from operator import index
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import isolated_rng

__all__ = ["Draws"]


class Draws:
    """An epoch of a sampler's indices, or of a batch sampler's batches; the same on every process and after a cut.

    It is drawn with the global random generators, and those that the sampler holds, seeded by (seed, epoch), and told
    the epoch by its ``set_epoch``, if it has one.

    Args:
        sampler: Yields indices, and has a length.
        batched: Whether it yields lists of indices.

    Attributes:
        first: The indices of one epoch, in order.
        is_fixed: Whether every epoch holds the same samples, each equally often.

    Raises:
        TypeError: If it has no length, yields anything else, or yields something else for the same seed and epoch.

    Example:
        >>> from torch.utils.data import SubsetRandomSampler
        >>> draws = Draws(SubsetRandomSampler([2, 3, 5]))
        >>> draws(0, 0) == draws(0, 0), sorted(draws(0, 1)), draws.is_fixed
        (True, [2, 3, 5], True)
    """

    def __init__(self, sampler: Iterable[Any], *, batched: bool = False) -> None:
        self.sampler = sampler
        self.batched = batched
        self.name = type(sampler).__name__
        try:
            self.length = len(sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"Argument `datamodule` expected a sampler with a length, but got {self.name}. Give it a `__len__`."
            ) from error
        first, again, other = self(0, 0), self(0, 0), self(0, 1)
        self.first = self._flat(first)
        if first != again:
            raise TypeError(
                f"Argument `datamodule` expected a sampler whose order follows from random generators and `set_epoch`, "
                f"but got {self.name}, which remembers its epochs. Give it a `set_epoch(epoch)` to start from."
            )
        self.is_fixed = sorted(self.first) == sorted(self._flat(other))

    def __call__(self, seed: int, epoch: int, again: int = 0) -> list[Any]:
        """The epoch's indices or batches.

        Args:
            seed: Of the run.
            epoch: From 0.
            again: From 0, for more of the same epoch.
        """
        number = derive_seed(seed, epoch, again)
        with isolated_rng(seed=number):
            _reseed(self.sampler, number)
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            return [self._plain(drawn) for drawn in islice(self.sampler, self.length)]

    def _plain(self, drawn: Any) -> Any:
        """Integers of Python, whatever the sampler makes them of."""
        try:
            return [index(number) for number in drawn] if self.batched else index(drawn)
        except TypeError as error:
            raise TypeError(
                f"Argument `datamodule` expected a sampler of indices, but got {self.name}, which yields "
                f"{type(drawn).__name__}. Let the data set add what the sampler adds."
            ) from error

    def _flat(self, drawn: list[Any]) -> list[int]:
        return list(chain.from_iterable(drawn)) if self.batched else drawn


def _reseed(sampler: object, seed: int) -> None:
    """Seed the generators that a sampler holds, and those of samplers that it holds."""
    for name, value in list(getattr(sampler, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random):
            value.seed(seed)
        elif isinstance(value, np.random.RandomState):
            value.seed(seed % 2**32)
        elif isinstance(value, np.random.Generator):
            setattr(sampler, name, np.random.default_rng(seed))
        elif isinstance(value, Sampler):
            _reseed(value, seed)
