"""Stopping in time: the best checkpoint among those that copy no more than held-out images, and patience."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_iet.callbacks import Evaluation
from tests.helpers.evaluations import Copier, fit

SMALL = {"num_inference_steps": 1, "k": 20, "every_n_epochs": 1, "keep_best": True, "pictures": False}


class Staged(Copier):
    """By epoch: noise, images half like training images, held-out images, then copies."""

    def image(self, seed, i):
        data, epoch = self.trainer.datamodule, self.trainer.current_epoch
        noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        real, copied = data.reference_set[i][0][None], data.train_set[i % len(data.train_set)][0][None]
        kinds = [noise, 0.5 * real + 0.5 * noise, 0.95 * real + 0.05 * noise, copied]
        return kinds[min(epoch, 3)]


def evaluated(tmp_path, *, epochs=6, ckpt_path=None, saving=(), **settings):
    evaluation = Evaluation(64, **(SMALL | settings))
    trainer = {"max_epochs": epochs} | ({"enable_checkpointing": True, "limit_val_batches": 1} if saving else {})
    trainer, module = fit(tmp_path, evaluation, module=Staged(), callbacks=saving, trainer=trainer, ckpt_path=ckpt_path)
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


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint",
    "ignore:The dirpath has changed",
)
def test_a_run_that_goes_on_from_before_an_evaluation_waits_as_long_as_one_that_was_not_cut_off(tmp_path):
    """A checkpoint of validation's end does not know the evaluation of its epoch; each counts once."""
    patience = 2
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    whole, trainer, _ = evaluated(tmp_path / "whole", epochs=9, patience=patience, saving=[saving])
    assert trainer.global_step == 2 * (3 + patience)  # the best after 3 epochs
    for epoch in (2, 3):  # the best, and the first that is not better
        there = tmp_path / str(epoch)
        last = tmp_path / f"epoch={epoch}.ckpt"
        again = ModelCheckpoint(there, save_top_k=0)
        evaluation, resumed, _ = evaluated(there, epochs=9, patience=patience, saving=[again], ckpt_path=last)
        assert resumed.global_step == trainer.global_step
        assert evaluation._waited == whole._waited == patience
        assert [point["step"] for point in evaluation.report["course"]] == [
            point["step"] for point in whole.report["course"]
        ]
        best = evaluation.report["run"]["best_without_copies"]
        assert best["epoch"] == 3
        if epoch == 2:
            kept = torch.load(next(there.rglob("best_without_copies.ckpt")), weights_only=True)
            assert kept["global_step"] == best["step"] == 6


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
