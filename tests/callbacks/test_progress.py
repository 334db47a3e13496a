"""The length of a run, as its progress bar shows it."""

import pytest

from lightning_iet.callbacks.progress import RunProgressBar
from tests.helpers.evaluations import fit


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
