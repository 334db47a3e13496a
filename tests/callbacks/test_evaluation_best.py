"""Stopping in time: the best checkpoint among those that copy no more than held-out images, and patience."""

import json
from pathlib import Path

import pytest
import torch

from lightning_iet.callbacks import Evaluation
from tests.helpers.evaluations import Copier, fit

SMALL = {"num_inference_steps": 1, "k": 20, "every_n_epochs": 1, "keep_best": True}


class Staged(Copier):
    """By epoch: noise, images half like training images, held-out images, then copies."""

    def image(self, seed, i):
        data, epoch = self.trainer.datamodule, self.trainer.current_epoch
        noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        real, copied = data.reference_set[i][0][None], data.train_set[i % len(data.train_set)][0][None]
        kinds = [noise, 0.5 * real + 0.5 * noise, 0.95 * real + 0.05 * noise, copied]
        return kinds[min(epoch, 3)]


def evaluated(tmp_path, *, epochs=6, ckpt_path=None, **settings):
    evaluation = Evaluation(64, **(SMALL | settings))
    trainer, module = fit(tmp_path, evaluation, module=Staged(), trainer={"max_epochs": epochs}, ckpt_path=ckpt_path)
    return evaluation, trainer, module


def test_the_kept_checkpoint_is_the_best_that_does_not_copy(tmp_path, capsys):
    evaluation, _, _ = evaluated(tmp_path)
    best = evaluation.report["run"]["best_without_copies"]
    assert best["epoch"] == 3  # of held-out images, before the copies
    assert Path(best["file"]).name == "best_without_copies.ckpt"
    assert torch.load(best["file"], weights_only=True)["epoch"] == 2
    written = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert written["run"]["best_without_copies"]["step"] == best["step"]
    assert written["generated"]["copied_fraction"] == 1
    assert "best without copies: step" in capsys.readouterr().out


def test_patience_ends_training(tmp_path):
    _, trainer, _ = evaluated(tmp_path, epochs=20, patience=2)
    assert trainer.current_epoch == 5  # the best after 3 epochs, and two evaluations without a better one


def test_a_resumed_run_remembers_its_best_and_how_long_it_has_waited(tmp_path):
    _, trainer, _ = evaluated(tmp_path / "first", epochs=4, patience=3)
    last = tmp_path / "last.ckpt"
    trainer.save_checkpoint(last)
    evaluation, trainer, _ = evaluated(tmp_path / "second", epochs=20, patience=3, ckpt_path=last)
    assert trainer.current_epoch == 6
    assert evaluation.report["run"]["best_without_copies"]["epoch"] == 3


def test_without_it_nothing_is_kept(tmp_path):
    evaluation, _, _ = evaluated(tmp_path, epochs=2, keep_best=False)
    assert "best_without_copies" not in evaluation.report["run"]
    assert not list(tmp_path.rglob("best_without_copies.ckpt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": True}, "Argument `keep_best` expected `every_n_epochs` as well"),
        ({"every_n_epochs": 1, "patience": 2}, "Argument `patience` expected `keep_best` as well"),
        ({"every_n_epochs": 1, "keep_best": True, "patience": 0}, "Argument `patience` expected an integer ≥ 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(8, **settings)
