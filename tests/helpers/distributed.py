"""Processes for distributed tests, started once for many tests, as forks of one that has imported all they need.

Importing torch and Lightning would take most of a test's time. Under `pytest -n 2` that one is itself a fork of the
process that runs the tests (:mod:`tests.helpers.first_fork`); else, or when a test has killed it, it is a new one.
"""

import gc
import io
import logging
import multiprocessing as mp
import os
import socket
import sys
import traceback
from contextlib import closing
from multiprocessing import forkserver
from multiprocessing.connection import wait
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.helpers.undrawn import leave_pictures_empty

_ENVIRONMENT = dict(os.environ)  # of no test in particular: the warm process serves all of them
_CONTEXT = mp.get_context("forkserver")
NEEDED = (  # the first imports almost all there is; the others are what runs import on their way
    "tests.helpers.kills", "sklearn.datasets", "optuna.samplers", "sqlalchemy.dialects.sqlite", "alembic.command",
)  # fmt: skip
_CONTEXT.set_forkserver_preload(list(NEEDED))


def forking():
    """How processes are started: as forks of a warm one, which looks for modules where this one does."""
    environment = _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    return _CONTEXT


class Processes:
    """W processes that run a function together, as torchrun would start them (gloo, one thread each).

    The function must be importable; what it returns (tensors, numbers, containers) comes back as a list by rank.
    """

    def __init__(self, world_size):
        context = forking()
        self.world_size = world_size
        self.pipes, self.workers = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, rank, world_size))
            worker.start()  # no daemon: those may not start the workers of a DataLoader
            theirs.close()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, function, *args, timeout=120, **kwargs):
        """``function(*args, **kwargs)`` on every process; raises the first failure, and kills all after the timeout."""
        port = free_port()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs, port))
        results, waiting = {}, dict(zip(self.pipes, range(self.world_size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                self.close()
                raise TimeoutError(f"Ranks {sorted(waiting.values())} did not finish within {timeout} s.")
            for pipe in ready:
                rank = waiting.pop(pipe)
                ok, value = pipe.recv()
                if not ok and waiting:
                    # The others may wait for this one for ever.
                    self.close()
                if not ok:
                    raise RuntimeError(f"Rank {rank} failed:\n{value}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        return [results[rank] for rank in range(self.world_size)]

    def close(self):
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()

    @property
    def alive(self):
        return all(worker.is_alive() for worker in self.workers)


def _serve(pipe, rank, world_size):
    start_quietly()
    while True:
        try:
            function, args, kwargs, port = pipe.recv()
        except EOFError:
            return
        try:
            buffer = io.BytesIO()
            # What a test leaves in the environment (Lightning its seed) must not reach the next one in this process.
            with patch.dict(os.environ, torchrun_environment(rank, world_size, port)):
                torch.save(function(*args, **kwargs), buffer)
            pipe.send((True, buffer.getvalue()))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()


def torchrun_environment(rank, world_size, port):
    """What torchrun tells a process of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def start_quietly():
    """What a new process does first: one thread, no word but errors, no pictures, workers of loaders as Linux has them.

    What it has found imported stays, and is nothing for its garbage collector.
    """
    gc.freeze()
    mp.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    leave_pictures_empty()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
