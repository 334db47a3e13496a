"""Runs that are cut more than once."""

from math import gcd

import pytest
import torch

from tests.helpers import kills
from tests.helpers.weights import assert_same_bits


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    kills.train(folder, save_top_k=-1, save_last=False)
    return folder


def at_step(folder, step):
    (path,) = folder.glob(f"checkpoints/epoch=*-step={step}.ckpt")
    return path


@pytest.mark.parametrize("cuts", [[8, 10], [16, 17, 21], [8, 9, 16, 18], [3, 5, 24]])
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
