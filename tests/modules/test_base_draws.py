"""Every process of plain DDP draws its own numbers, and a resumed run new ones."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.helpers.models import quiet_trainer, tiny_diffusion

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
