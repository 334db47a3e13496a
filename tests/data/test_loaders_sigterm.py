"""Workers of a loader do not end at the first SIGTERM, but at the second."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_iet.data.loaders import IgnoreFirstSigterm


class Nervous(torch.utils.data.Dataset):
    """Sends its worker a number of signals before it yields a sample."""

    def __init__(self, signals):
        self.signals = signals

    def __len__(self):
        return 2

    def __getitem__(self, index):
        for _ in range(self.signals if index == 0 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return index


def remember(worker):
    torch.utils.data.get_worker_info().dataset.prepared = True


def read(signals):
    return [int(x) for x in DataLoader(Nervous(signals), num_workers=1, worker_init_fn=IgnoreFirstSigterm(remember))]


def test_one_signal_is_waited_out():
    assert read(1) == [0, 1]


def test_the_second_ends_the_worker():
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed"):
        read(2)
