"""Disjoint sets of samples: to train on, and to hold out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def select_disjoint(labels: Tensor, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
    """Select disjoint sets of samples at random, each with as many samples of each class as there are.

    Args:
        labels: Classes, shape ``(n,)``.
        sizes: Number of samples of each set; at most n together.
        seed: Seed of the selection.

    Raises:
        ValueError: If more samples are asked for than there are.

    Example:
        >>> [sorted(part.tolist()) for part in select_disjoint(torch.tensor([0, 0, 1, 1]), [2, 2], seed=0)]
        [[0, 3], [1, 2]]
    """
    if sum(sizes) > len(labels) or min(sizes) < 1:
        raise ValueError(
            f"Argument `sizes` expected numbers ≥ 1, together at most {len(labels)}, but got {list(sizes)}."
        )
    return list(deal(labels, seed=seed)[: sum(sizes)].split(list(sizes)))


def deal(labels: Tensor, *, seed: int, proportional: bool = False) -> Tensor:
    """Return a random order of samples in which the classes take turns.

    Args:
        labels: Classes, shape ``(n,)``.
        seed: Seed of the order.
        proportional: Whether any stretch of the order holds the classes in the shares that they have of all samples,
            instead of equally many of each as long as they last.

    Returns:
        A permutation, shape ``(n,)``.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> [labels[deal(labels, seed=0, proportional=proportional)].tolist() for proportional in (False, True)]
        [[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, counts = labels[order].unique(return_inverse=True, return_counts=True)
    # How many of the class came before each sample: its place among its class, which sorting puts in one row.
    by_class = torch.argsort(classes, stable=True)
    before = torch.empty_like(classes)
    before[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = (before + 0.5) / counts[classes] if proportional else before
    return order[torch.argsort(turn, stable=True)]


class SetSizes(NamedTuple):
    """How many images go into each set, as a user asks for it."""

    train: int | None
    """``None`` = all that are left."""
    control: int
    reference: int | None
    """``None`` = all that are left; as many as in the control where the training set takes those."""

    def of_one(self, available: int) -> list[int]:
        """Return the sizes of the three sets where all come from one source.

        Raises:
            ValueError: If there are not that many images.

        Example:
            >>> SetSizes(None, 10, None).of_one(100), SetSizes(50, 10, None).of_one(100)
            ([80, 10, 10], [50, 10, 40])
        """
        reference = self.reference
        if reference is None:
            reference = self.control if self.train is None else available - self.train - self.control
        train = available - self.control - reference if self.train is None else self.train
        sizes = [train, self.control, reference]
        self._check(train >= 1 and min(sizes) >= 0 and sum(sizes) <= available, available)
        return sizes

    def of_two(self, available: int, held_out: int) -> tuple[list[int], list[int]]:
        """Return the sizes of the training set, and of the two others where these have a source of their own.

        Raises:
            ValueError: If there are not that many images.

        Example:
            >>> SetSizes(None, 10, None).of_two(100, 50)
            ([100], [10, 40])
        """
        train = available if self.train is None else self.train
        reference = held_out - self.control if self.reference is None else self.reference
        others = [self.control, reference]
        self._check(1 <= train <= available, available)
        self._check(min(others) >= 0 and sum(others) <= held_out, held_out)
        return [train], others

    def _check(self, fits: bool, available: int) -> None:
        if not fits:
            raise ValueError(
                f"Arguments `subset`, `num_control` and `num_reference` expected numbers for which {available} images "
                f"suffice, with one to train on, but got {self.train}, {self.control} and {self.reference}. "
                "Ask for fewer."
            )
