"""The processes that share an audit, started by torchrun; one process is a group of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

__all__ = ["all_or_none", "gather", "process_group", "rank", "world_size"]

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, unless that is done or there is only this one."""
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return what each process has given, by rank, on every process.

    Example:
        >>> gather("alone")
        ['alone']
    """
    values: list[T | None] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return cast(list[T], values)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Wait at the end of a block for the other processes, and raise on every process what one of them has raised.

    Without it a process whose disk is full would leave the others waiting.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    first = next((e for e in gather(error) if e is not None), None)
    if error or first:
        raise error or cast(Exception, first)
