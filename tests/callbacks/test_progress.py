"""The length of a run, as its progress bar shows it."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_iet.callbacks.progress import RunProgressBar
from tests.helpers.evaluations import fit
from tests.helpers.models import quiet_trainer


class Watched(RunProgressBar):
    """Keeps the state of the bar before it is closed."""

    def on_train_end(self, trainer, pl_module):
        self.task = self.progress.tasks[0]
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"max_epochs": 3}, 6),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": 2, "max_steps": 5}, 4),
        ({"max_epochs": -1, "max_steps": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 8}, 6),  # a step at the end of each epoch
    ],
)
def test_the_bar_ends_where_the_run_does(tmp_path, limits, batches):
    bar = Watched()
    fit(tmp_path, callbacks=[bar], trainer={"enable_progress_bar": True, **limits})
    assert (bar.task.completed, bar.task.total) == (batches, batches)


class TwoOptimizers(pl.LightningModule):
    """Takes two steps in a batch, and none in each third one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if batch_idx % 3 < 2:
            for optimizer in self.optimizers():
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weight], lr=0.1), torch.optim.SGD([self.weight], lr=0.1)]


@pytest.mark.parametrize(
    ("limits", "total", "completed"),
    [({"max_epochs": 3, "max_steps": 6}, 9, 4), ({"max_epochs": -1, "max_steps": 6}, None, 4)],
)
def test_of_manual_optimization_a_limit_of_steps_tells_nothing_of_batches(tmp_path, limits, total, completed):
    bar = Watched()
    trainer = quiet_trainer(tmp_path, callbacks=[bar], enable_progress_bar=True, **limits)
    trainer.fit(TwoOptimizers(), DataLoader(torch.zeros(3)))
    assert (bar.task.total, bar.task.completed) == (total, completed)
