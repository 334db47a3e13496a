import random

import numpy as np
import torch

from lightning_iet.utilities.random import get_rng_state, isolated_rng, seed_rng, set_rng_state


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_a_seed_fixes_all_generators():
    seed_rng(2**62)
    first = draw()
    seed_rng(2**62)
    assert draw() == first
    seed_rng(1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_a_state_is_put_back_whole_and_loads_without_pickled_code(tmp_path):
    torch.save(get_rng_state(), tmp_path / "state")
    first = draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


def test_an_isolated_block_leaves_no_trace_also_when_it_fails():
    seed_rng(0)
    expected = draw()
    seed_rng(0)
    try:
        with isolated_rng(seed=5):
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected
