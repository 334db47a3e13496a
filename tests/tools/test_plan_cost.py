import pytest
import torch
from torch import nn

from lightning_iet import DiffusionModule
from lightning_iet.tools.plan import Cost, ModelSize, Schedule, cost_table, model_size
from tests.helpers.models import tiny_diffusion, tiny_unet


@pytest.mark.parametrize(
    ("optimizer", "tensors"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-3), 2),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), 3),
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 1),
    ],
)
def test_bytes_are_those_of_a_real_run(optimizer, tensors):
    module = tiny_diffusion(optimizer=optimizer)
    size = model_size(module)
    assert size.trained == sum(p.numel() for p in module.unet.parameters())
    assert size.averaged == 2 * 4 * size.trained
    assert size.gradients == 4 * size.trained
    real = module.configure_optimizers()
    for parameter in module.unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    kept = [t for state in real.state.values() for name, t in state.items() if name != "step" and t is not None]
    assert size.optimizer == sum(t.numel() * t.element_size() for t in kept) == tensors * 4 * size.trained


def test_frozen_parameters_are_shared():
    unet = tiny_unet()
    unet.conv_in.requires_grad_(False)
    frozen = sum(p.numel() for p in unet.conv_in.parameters())
    size = model_size(DiffusionModule(unet, ema_decay=0))
    assert size.trained == sum(p.numel() for p in unet.parameters()) - frozen
    assert (size.frozen, size.shared) == (frozen, 4 * frozen)


def test_an_optimizer_that_nobody_can_ask_for_is_not_guessed():
    size = model_size(nn.Linear(2, 2))
    assert size.optimizer is None
    assert "not known" in text(Cost(size, Schedule((10,), 1, 5, 2, None)))


@pytest.mark.parametrize(
    ("settings", "steps", "process_steps", "averagings"),
    [
        (((100,), 1, 10, 3, None), 30, 30, 0),
        (((100,), 1, 10, None, 25), 25, 25, 0),
        (((100,), 1, 10, 2, 25), 20, 20, 0),
        (((100,), 1, 10, None, None), None, None, 0),
        (((50, 50), 1, 5, 6, None, 2), 30, 60, 3),
        (((50, 50), 2, 5, 7, None, 2), 35, 35, 4),
        (((50, 50), 4, 5, 6, None, None, 4), 30, 30, 8),
        (((50, 50), 2, 5, None, None, 2), None, None, None),
    ],
)
def test_lengths_of_runs(settings, steps, process_steps, averagings):
    schedule = Schedule(*settings)
    assert (schedule.steps, schedule.process_steps, schedule.averagings) == (steps, process_steps, averagings)


SIZE = ModelSize(trained=25, frozen=5, averaged=200, optimizer=200, gradients=100, shared=20)


def test_memory_and_messages():
    one = Cost(SIZE, Schedule((50,) * 10, 1, 5, 4, None, 2), step_seconds=0.5)
    assert one.memory == 10 * 400 + 100 + 20
    assert one.sent == 0
    assert one.seconds == 0.5 * 10 * 20
    five = Cost(SIZE, Schedule((50,) * 10, 5, 5, 4, None, 2))
    assert five.memory == 2 * 400 + 100 + 20
    assert five.sent == 2 * 4 / 5 * 200
    assert five.seconds is None


def text(cost):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(cost_table(cost))
    return capture.get()


def test_the_table_says_all_of_it():
    cost = Cost(SIZE, Schedule((50, 51), 2, 5, 4, None, 2), step_seconds=3600.0, peak=3 * 2**30, device="cuda:0")
    found = text(cost)
    for words in ("25", "50 to 51 images", "20", "5 in an epoch, 4 epochs", "3.0 GiB", "cuda:0", "20 h 0 min"):
        assert words in found
    assert "not measured" in text(Cost(SIZE, Schedule((50,), 1, 5, None, None)))
