"""Processes for distributed tests, started once for many tests: importing torch takes most of a test's time."""

import io
import logging
import os
import socket
import traceback
from contextlib import closing
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """W processes that run a function together, as torchrun would start them (gloo, one thread each).

    The function must be importable; what it returns (tensors, numbers, containers) comes back as a list by rank.
    """

    def __init__(self, world_size):
        context = mp.get_context("spawn")
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
    torch.set_num_threads(1)
    quiet_logs()
    while True:
        try:
            function, args, kwargs, port = pipe.recv()
        except EOFError:
            return
        os.environ.update(torchrun_environment(rank, world_size, port))
        try:
            buffer = io.BytesIO()
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


def quiet_logs():
    """Let Lightning speak of errors only."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
