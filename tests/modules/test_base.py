"""The base of both modules: the average of the weights, and random numbers of each process and resumed run."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lightning_iet.modules.base import ExponentialMovingAverage
from tests.helpers.models import quiet_trainer, tiny_diffusion

# --- average ----------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))


def change(net):
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(torch.ones_like(tensor))


def test_the_average_is_that_of_torch():
    net = network()
    ours = ExponentialMovingAverage(net, decay=0.9)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)  # the first update copies
    ours.follow(net)
    for number in range(3):
        change(net)
        ours.update()
        theirs.update_parameters(net)
        for name, averaged in theirs.module.named_parameters():
            assert torch.equal(ours.weights()[name], averaged)
        for buffer, current in zip(ours.module.buffers(), net.buffers(), strict=True):
            assert torch.equal(buffer, current)
        assert ours.n_averaged == number + 1
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ours.follow(None)
    with pytest.raises(RuntimeError, match="Call `follow"):
        ours.update()


def test_what_is_frozen_has_no_second_copy():
    net = network()
    whole, trainable = (ExponentialMovingAverage(net, decay=0.9, trainable_only=only) for only in (False, True))
    assert list(trainable.weights()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(trainable.state_dict()) == ["n_averaged", *(f"module.{number}" for number in range(4))]
    for average in (whole, trainable):
        average.follow(net)
    change(net[0])
    for average in (whole, trainable):
        average.update()
    images = torch.rand(5, 3)
    net.eval(), whole.eval()
    assert torch.equal(trainable.call(net, images), whole.call(net, images))
    assert not torch.equal(trainable.call(net, images), net(images))


# --- random numbers ---------------------------------------------------------------------------------------------------

IMAGES = [(torch.full((1, 8, 8), number / 16), 0, number) for number in range(16)]


class Timesteps(pl.Callback):
    """Takes down what was drawn."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn.append(outputs["timesteps"].tolist())


def fit(folder, *, max_epochs=1, ckpt_path=None, **trainer):
    taken = Timesteps()
    callbacks = [taken, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    pl.seed_everything(0, verbose=False)
    trainer |= {"max_epochs": max_epochs, "callbacks": callbacks, "enable_checkpointing": True, "limit_val_batches": 1}
    runner = quiet_trainer(folder, **trainer)
    runner.fit(tiny_diffusion(), *[DataLoader(IMAGES, batch_size=4)] * 2, ckpt_path=ckpt_path)
    return taken.drawn


def fit_on_two(folder):
    from pathlib import Path

    return fit(Path(folder), devices=2, strategy="ddp")


def test_processes_draw_different_numbers(tmp_path, processes):
    first, second = processes(2).run(fit_on_two, str(tmp_path))
    assert len(first) == len(second) == 2
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_new_run_on_one_process_is_left_as_it_was_seeded(tmp_path):
    assert fit(tmp_path / "a") == fit(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:.*resum.*")
def test_a_resumed_run_does_not_draw_the_first_numbers_again(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(again) == len(first) == 4
    assert all(a != b for a, b in zip(first, again, strict=True))
