"""Runs that are cut more than once."""

import os
import signal
from math import gcd

import lightning.pytorch as pl
import pytest
import torch

from lightning_iet.callbacks.interruptions import StopSignal
from tests.helpers import kills
from tests.helpers.evaluations import fit
from tests.helpers.weights import assert_same_bits


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    kills.train(folder, save_top_k=-1, save_last=False)  # after every step
    return folder


def at_step(folder, step):
    (path,) = folder.glob(f"checkpoints/epoch=*-step={step}.ckpt")
    return path


@pytest.mark.parametrize("cuts", [[8, 9, 16, 18], [5, 24]])
def test_a_run_cut_again_after_the_end_of_an_epoch_ends_in_the_same_bits(uncut, tmp_path, cuts):
    """Lightning alone counts epochs wrong once it has gone on from the last step of one (8 steps each here)."""
    folder = uncut
    for number, step in enumerate(cuts):
        start = at_step(folder, step)
        folder = tmp_path / str(number)
        folder.mkdir()
        every = gcd(*cuts[number + 1 :]) or 1000  # no checkpoint that nobody reads
        kills.train(folder, start=start, every_n_train_steps=every, save_top_k=-1, save_last=False)
        assert kills.diary(folder, "start") in ([step], [])  # [] = there was nothing left to do
        assert_same_bits(torch.load(folder / "final.pt"), torch.load(uncut / "final.pt"))


def test_a_signal_is_heard_where_an_epoch_is_shorter_than_the_window_of_accumulated_gradients(tmp_path):
    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)

        def on_train_epoch_start(self, trainer, pl_module):
            assert trainer.current_epoch == 0

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, callbacks=[Kill(), StopSignal()], trainer={"accumulate_grad_batches": 8})
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
