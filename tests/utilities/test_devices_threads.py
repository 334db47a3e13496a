"""Threads by the environment and by the size of a step; every test starts without a number that the user has set."""

import os

import pytest
import torch
from torch import nn

from lightning_iet.utilities import devices
from lightning_iet.utilities.devices import (
    become_a_job,
    environment_of_a_job,
    is_small,
    multiply_adds,
    threads_of_a_job,
    training_threads,
    user_threads,
)
from tests.helpers.models import tiny_diffusion

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "LIGHTNING_IET_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": " 2 "}, 2),
        ({"MKL_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"MKL_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "4", "LIGHTNING_IET_THREADS": "4"}, None),  # of a sweep's run
        ({"OMP_NUM_THREADS": "3", "LIGHTNING_IET_THREADS": "4"}, 3),
        ({"MKL_NUM_THREADS": "4", "OMP_NUM_THREADS": "4", "LIGHTNING_IET_THREADS": "4"}, 4),
    ],
)
def test_what_the_user_has_set(environment, number, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_threads() == number


def test_jobs_share_the_cores_and_jobs_of_a_job_its_share(monkeypatch):
    assert [threads_of_a_job(number) for number in (1, 2, 3, 100)] == [8, 4, 2, 1]
    environment = environment_of_a_job(2)
    assert environment["OMP_NUM_THREADS"] == "4"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_threads() is None
    assert [threads_of_a_job(number) for number in (1, 2, 3, 100)] == [4, 2, 1, 1]
    assert environment_of_a_job(2)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("name", ["MKL_NUM_THREADS", "OMP_NUM_THREADS"])
def test_jobs_have_as_many_threads_as_the_user_has_set(name, monkeypatch):
    monkeypatch.setenv(name, "3")
    assert threads_of_a_job(2) == 3
    assert environment_of_a_job(2) == dict(os.environ)
    become_a_job(3)
    assert torch.get_num_threads() == 3
    assert user_threads() == 3


def test_a_process_with_a_share_may_still_choose_fewer():
    become_a_job(4)
    assert torch.get_num_threads() == 4
    assert user_threads() is None
    with training_threads(tiny_diffusion(), 14, CPU) as chosen:
        assert (chosen, torch.get_num_threads()) == (1, 1)
    assert torch.get_num_threads() == 4


def test_a_small_network_trains_on_one_thread_until_the_block_ends():
    torch.set_num_threads(2)
    module = tiny_diffusion()
    parameters = sum(parameter.numel() for parameter in module.unet.parameters())
    assert multiply_adds(module, 14) == parameters * 64 * 14  # without those of the average
    with training_threads(module, 14, CPU) as chosen:
        assert (chosen, torch.get_num_threads()) == (1, 1)
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="an image"), training_threads(module, 14, CPU):
        raise ValueError("an image cannot be read")
    assert torch.get_num_threads() == 2


def test_the_size_of_a_step_decides(monkeypatch):
    module = tiny_diffusion()
    monkeypatch.setattr(devices, "SMALL", multiply_adds(module, 8))
    assert is_small(module, 7)
    assert not is_small(module, 8)


def unknown(**attributes):
    module = nn.Linear(1, 1)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "batch_size", "device"),
    [
        (unknown(), 14, "cpu"),
        (unknown(image_shape=None), 14, "cpu"),
        (unknown(image_shape=(1, 8, 8)), None, "cpu"),
        (unknown(image_shape=(1, 8, 8)), 14, "cuda"),
        (unknown(image_shape=(1, 1000, 1000)), 2500, "cpu"),
    ],
)
def test_all_threads_stay_for_large_steps_those_of_unknown_size_and_accelerators(module, batch_size, device):
    torch.set_num_threads(2)
    with training_threads(module, batch_size, torch.device(device)) as chosen:
        assert (chosen, torch.get_num_threads()) == (None, 2)
    assert torch.get_num_threads() == 2


def test_what_the_user_has_set_stays(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with training_threads(tiny_diffusion(), 14, CPU) as chosen:
        assert (chosen, torch.get_num_threads()) == (None, 2)
